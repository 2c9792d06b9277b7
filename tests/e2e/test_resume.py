"""Runs that are interrupted and go on: nothing lost, nothing twice, and in `inline` mode bit by bit the
same."""

import pytest
from launched import ENDLESS, LONG_S

import asyncrl
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.budget import Usage
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.layout import RunDir
from asyncrl.trainer.backend import make_trainer


class Interruption(Exception):  # noqa: N818 - says what it is
    pass


@pytest.fixture
def interrupt_at(monkeypatch):
    """`interrupt_at(step)`: the next run in this process ends in the midst of that step, its update done and
    nothing of it told to anybody. None: it does not."""
    chosen = {}

    class Interrupted:
        def __init__(self, config):
            self._trainer = make_trainer(config)

        def step(self, batch, total_steps=None):
            metrics = self._trainer.step(batch, total_steps)
            if batch.step == chosen["step"]:
                raise Interruption
            return metrics

        def __getattr__(self, name):
            return getattr(self._trainer, name)

    def interrupt_at(step):
        chosen["step"] = step
        monkeypatch.setattr("asyncrl.loop.inline.make_trainer", Interrupted)

    return interrupt_at


def final_hash(run_dir, step):
    return Checkpoints(run_dir / "checkpoints").at(step).state().weights_hash


@pytest.mark.slow
def test_an_inline_run_interrupted_at_every_step_ends_with_the_same_weights(
    make_config, one_thread, interrupt_at, tmp_path
):
    def config(name):
        return make_config(
            *("run.mode=inline", "run.steps=10", "staleness.max_staleness=2", "rollout.slots=10"),
            *(f"run.dir={tmp_path / name}", "checkpoint.every_steps=3", "trainer.mini_batches=2"),
        )

    interrupt_at(None)
    asyncrl.run(config("whole"), progress=False)
    run = tmp_path / "interrupted"
    for step in range(10):
        interrupt_at(step)
        with pytest.raises(Interruption):
            asyncrl.run(config("interrupted"), progress=False) if step == 0 else asyncrl.resume(
                run, progress=False
            )
    interrupt_at(None)
    asyncrl.resume(run, progress=False)
    assert final_hash(run, 10) == final_hash(tmp_path / "whole", 10)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["reward/mean"] for line in lines] == [
        line["reward/mean"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")
    ]
    assert 1 <= max(line["staleness/max"] for line in lines) <= 2


@pytest.mark.slow
def test_what_an_inline_run_chooses_is_the_same_after_an_interruption(
    make_config, one_thread, interrupt_at, tmp_path
):
    def config(name):
        return make_config(
            *("run.mode=inline", "run.steps=7", "rollout.slots=10", "trainer.mini_batches=2"),
            *("data.curriculum={success_above: 0.05, rest_epochs: 2}", "rollout.candidates=7"),
            "trainer.batch_tokens=90",
            *(f"run.dir={tmp_path / name}", "checkpoint.every_steps=3"),
        )

    interrupt_at(None)
    asyncrl.run(config("whole"), progress=False)
    run = tmp_path / "interrupted"
    interrupt_at(4)
    with pytest.raises(Interruption):
        asyncrl.run(config("interrupted"), progress=False)
    interrupt_at(None)
    asyncrl.resume(run, progress=False)
    assert final_hash(run, 7) == final_hash(tmp_path / "whole", 7)
    one, other = (read_metrics(path / "metrics.jsonl")[-1] for path in (run, tmp_path / "whole"))
    names = [name for name in one if name.startswith(("ledger/", "data/", "curriculum/", "trained_"))]
    assert {name: one[name] for name in names} == {name: other[name] for name in names}


def test_a_run_that_is_over_has_nothing_left_to_do_and_may_be_made_longer(make_config, one_thread, tmp_path):
    config = make_config("run.mode=inline", "run.steps=3", "checkpoint.every_steps=1")
    first = asyncrl.run(config, progress=False)
    again = asyncrl.resume(first.run_dir, progress=False)
    assert again.checkpoint == first.checkpoint
    assert len(read_metrics(first.run_dir / "metrics.jsonl")) == 3
    asyncrl.resume(first.run_dir, ["run.steps=5"], progress=False)
    assert len(read_metrics(first.run_dir / "metrics.jsonl")) == 5
    kept = Checkpoints(first.run_dir / "checkpoints").all()
    assert [checkpoint.step for checkpoint in kept] == [5, 4]


def test_the_same_command_again_goes_on_and_so_do_its_clocks(make_config, one_thread, interrupt_at, tmp_path):
    """`run.resume=auto`, as a cluster that starts a job again needs it."""
    config = make_config("run.mode=inline", "run.steps=5", "run.resume=auto", "checkpoint.every_steps=2")
    run_dir = RunDir(tmp_path / "run")
    interrupt_at(3)
    with pytest.raises(Interruption):
        asyncrl.run(config, progress=False)
    before, usage = read_metrics(run_dir.path / "metrics.jsonl"), Usage.load(run_dir.usage)
    assert [line["step"] for line in before] == [1, 2, 3]
    assert usage.started_at < usage.seen_at
    interrupt_at(None)
    asyncrl.run(config, progress=False)
    lines = read_metrics(run_dir.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[:2] == before[:2], "step 2 has a checkpoint"
    wall_s = [line["wall_s"] for line in lines]
    assert wall_s == sorted(set(wall_s))
    assert Usage.load(run_dir.usage).started_at > usage.seen_at
    asyncrl.run(config, progress=False)  # over: nothing is left to do
    assert read_metrics(run_dir.path / "metrics.jsonl") == lines


def test_what_a_run_keeps_for_life_cannot_be_changed(make_config, one_thread):
    config = make_config("run.mode=inline", "run.steps=1")
    run_dir = asyncrl.run(config, progress=False).run_dir
    with pytest.raises(asyncrl.ConfigError, match=r"run.seed=7: the run .* was started with 0, which cannot"):
        asyncrl.resume(run_dir, ["run.seed=7"])
    with pytest.raises(asyncrl.ConfigError, match=r"staleness.max_staleness=9.*was started with 2"):
        asyncrl.resume(run_dir, ["staleness.max_staleness=9"])
    with pytest.raises(asyncrl.ConfigError, match="go on with it by `asyncrl-launch --resume"):
        asyncrl.run(config)


@pytest.mark.slow
def test_a_damaged_ledger_gives_way_to_the_checkpoints_own(launch):
    launched = launch(ENDLESS, "checkpoint.every_steps=4")
    launched.wait_for_steps(9)
    launched.wait(Checkpoints(launched.run_dir / "checkpoints").all, "a checkpoint")
    launched.kill_whole()
    steps = launched.steps() + 3
    for suffix in ("", "-wal", "-shm"):
        (launched.run_dir / f"ledger.db{suffix}").write_bytes(b"noise" * 5000)
    launched = launch(f"run.steps={steps}", resume=launched.run_dir)
    assert launched.end(LONG_S) == 0, launched.output.read_text()
    launched.assert_all_steps_are_done(steps)
