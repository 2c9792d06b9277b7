import io
import json
import math
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from asyncrl.observe.metrics import MetricsError
from asyncrl.observe.summary import newest_checkpoint, print_summary, scores, summarise


@pytest.fixture
def run_dir(tmp_path, make_line):
    """Eight steps that end at 1, 2, ... 7 and 20 s; the last one is slow, idle and without generation."""

    def line(step: int) -> dict:
        changes = {
            "wall_s": float(step),
            "reward/mean": step / 10,
            "staleness/mean": 1.0,
            "staleness/max": 2 if step == 4 else 1,
            "idle/trainer": 0.0,
            "idle/rollout": None,
            "throughput/generated_tokens_per_s": 2000.0,
        }
        slow = {"wall_s": 20.0, "idle/trainer": 1.0, "throughput/generated_tokens_per_s": 0.0}
        return make_line(step) | changes | (slow if step == 8 else {})

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 9)))
    (tmp_path / "tensorboard").mkdir()
    return tmp_path


def add_checkpoint(run_dir: Path, name: str, form: str) -> Path:
    folder = run_dir / "checkpoints" / name / form
    folder.mkdir(parents=True)
    return folder


def test_numbers(run_dir):
    s = summarise(run_dir)
    assert (s.steps, s.wall_s) == (8, 20.0)
    assert s.reward_first == pytest.approx(0.2)  # steps 1 to 3
    assert s.reward_last == pytest.approx(0.6)  # steps 4 to 8
    assert (s.staleness_mean, s.staleness_max) == (1.0, 2)
    assert (s.generated_groups, s.trained_groups, s.dropped_groups, s.failed_groups, s.in_flight_groups) == (
        168,
        128,
        5,
        3,
        32,
    )


def test_shares_and_rates_are_those_of_the_wall_clock_not_of_the_steps(run_dir):
    s = summarise(run_dir)
    assert s.idle_trainer == pytest.approx(13 / 20)
    assert s.generated_tokens_per_s == pytest.approx(2000 * 7 / 20)
    assert s.trained_tokens_per_s == pytest.approx(2500)


def test_what_was_never_known_is_nan(run_dir):
    assert math.isnan(summarise(run_dir).idle_rollout)


def test_fewer_steps_than_the_windows(tmp_path, make_line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(make_line(1)) + "\n")
    s = summarise(tmp_path)
    assert s.reward_first == s.reward_last == pytest.approx(0.31)


def test_the_newest_whole_checkpoint_is_the_model(run_dir):
    assert summarise(run_dir).checkpoint is None
    add_checkpoint(run_dir, "step_9", "hf")
    newest = add_checkpoint(run_dir, "step_10", "adapter")
    add_checkpoint(run_dir, "step_11.unfinished", "hf")  # what a killed run was writing
    add_checkpoint(run_dir, "step_12.damaged", "hf")
    assert newest_checkpoint(run_dir) == newest == summarise(run_dir).checkpoint
    assert summarise(run_dir).checkpoints == 2


def test_the_board_command_can_be_pasted_into_a_shell(run_dir, tmp_path_factory):
    spaced = tmp_path_factory.mktemp("my runs")
    (spaced / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes())
    command = summarise(spaced).board_command
    assert shlex.split(command) == ["tensorboard", "--logdir", str(spaced / "tensorboard")]


def test_what_checkpoints_cost(tmp_path, make_line):
    lines = [make_line(step, time__checkpoint_s=0.75 * (step % 2)) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("step_3", "step_5", "step_7.unfinished"):
        (add_checkpoint(tmp_path, name, "hf") / "model.safetensors").write_bytes(bytes(10**6))
    s = summarise(tmp_path)
    assert (s.checkpoints, s.checkpoint_bytes, s.checkpoint_s) == (2, 2 * 10**6, 2.25)
    out = io.StringIO()
    print_summary(s, Console(file=out, width=80))
    (line,) = (line for line in out.getvalue().splitlines() if line.startswith("checkpoints"))
    assert line.endswith("2 kept, 2.0 MB; training waited 2.2 s for them (11%)")  # of 20 s


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_printed_summary_keeps_paths_and_commands_whole(run_dir, width):
    folder = add_checkpoint(run_dir, "step_8", "hf")
    out = io.StringIO()
    print_summary(summarise(run_dir), Console(file=out, width=width))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    for ending in (
        "0.200 (first 3 steps) to 0.600 (last 5 steps)",
        "8 in 0:20",
        "700 generated, 2,500 trained",
        "mean 1.00, max 2",
        "trainer 65%, rollout -",
        "168 admitted: 128 trained, 5 dropped, 3 failed, 32 in flight at the end",
        str(run_dir),
        str(folder),
        f"tensorboard --logdir {run_dir / 'tensorboard'}",
    ):
        assert any(line.endswith(ending) for line in lines), ending
    assert "\x1b" not in out.getvalue()


def test_a_run_without_a_finished_step_says_where_to_look(tmp_path):
    with pytest.raises(FileNotFoundError):
        summarise(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(MetricsError, match=r"no finished training step; see .*logs"):
        summarise(tmp_path)


def test_the_first_and_the_last_scores_are_told_with_their_errors():
    part = {"eval/means/reward/part/mean": 0.1}
    first = {"eval/means/reward/mean": 0.25, "eval/means/reward/stderr": 0.01} | part
    last = first | {"eval/means/reward/mean": 0.5, "eval/b/reward/mean": 1.0}
    assert dict(scores({0: first, 8: last})) == {
        "means": "0.250 ± 0.010 (version 0) to 0.500 ± 0.010 (version 8)",
        "b": "1.000 ± - (version 8)",
    }
    assert dict(scores({3: first})) == {"means": "0.250 ± 0.010 (version 3)"}
    assert dict(scores({})) == {}


def test_a_console_without_a_character_shows_the_rest(run_dir):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=200)
    print_summary(summarise(run_dir), console, [("aufgäben", "0.5 ± 0.1")])
    assert raw.getvalue().decode("ascii").splitlines()[-1] == "aufg?ben           0.5 ? 0.1"
