"""Rows that a whole group has failed come with their hint, and without it again."""

import asyncio
import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncrl
from asyncrl.config import RewardConfig
from asyncrl.config.data import DataConfig, HintsConfig
from asyncrl.config.load import from_tree
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan
from asyncrl.curriculum.hints import WithHints, with_hints, with_prompt
from asyncrl.curriculum.samplers import make_sampler
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import read_metrics
from asyncrl.reward.likelihood import ReferenceNotes
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.group import GroupRollout, Response
from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.trainer.packing.batch import flatten
from asyncrl.wire.codec import decode_group

TOKENIZER = byte_tokenizer(max_length=4096)


@pytest.fixture
def load(tmp_path):
    """Writes rows; gives them as prompts with hints."""

    def load(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(path=str(path), hints={"column": "hint", **settings.pop("hints", {})}, **settings)
        return with_hints(load_prompts(data, TOKENIZER), data, TOKENIZER)

    return load


def test_rows_with_hints_follow_all_others(load, tmp_path):
    rows = [{"prompt": "1+1", "hint": None}, {"prompt": "2+2", "hint": "count"}, {"prompt": "3+3"}]
    prompts = load(rows)
    assert [row.prompt for row in prompts] == ["1+1", "2+2", "3+3", "2+2\n\ncount"]
    assert [row.hint_of for row in prompts] == [None, None, None, 1]
    assert [row.index for row in prompts] == [0, 1, 2, 3]
    assert prompts.counts() == [3]
    assert TOKENIZER.decode(prompts[3].prompt_ids) == TOKENIZER.decode(prompts[1].prompt_ids) + "\n\ncount"
    assert prompts[3].trained_ids.tolist() == prompts[1].prompt_ids.tolist()
    assert load(rows, hints={"train": "with"})[3].trained_ids is None
    prompts.save(tmp_path / "prompts")
    again = PromptSet.load(tmp_path / "prompts")
    assert [row.hint_of for row in again] == [row.hint_of for row in prompts]
    assert again[3].trained_ids.tolist() == prompts[3].trained_ids.tolist()
    assert again[0].trained_ids is None


def test_a_response_to_begin_with_is_kept_whole_beside_its_row(load, tmp_path):
    rows = [{"prompt": "1+1", "hint": None}, {"prompt": "2+2", "hint": "count to 4"}]
    prompts = load(rows, hints={"give": "prefix"})
    assert [row.hint_of for row in prompts] == [None, None, 1]
    prompts.save(tmp_path / "prompts")
    for row in (prompts[2], PromptSet.load(tmp_path / "prompts")[2]):
        assert (row.prompt, row.prompt_ids.tolist()) == ("2+2", prompts[1].prompt_ids.tolist())
        assert TOKENIZER.decode(row.prefix_ids) == "count to 4"
    own = load(rows, hints={"give": "prefix", "column": None})
    assert [(row.hint_of, row.prefix_ids) for row in own][2:] == [(0, None), (1, None)]


def test_a_hint_goes_into_the_users_last_message(load):
    turns = [{"role": "user", "content": "2+2"}]
    called = [*turns, {"role": "tool", "content": "4"}]
    prompts = load([{"prompt": turns, "hint": "count"}, {"prompt": called, "hint": "count"}])
    assert prompts[2].prompt == [{"role": "user", "content": "2+2\n\ncount"}]
    assert prompts[3].prompt == [*called, {"role": "user", "content": "count"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "data.hints.column=hint: no row has a hint there"),
        ({"prompt": "a", "hint": ["b"]}, "the hint of row 0 is of type list; it should be text, or null"),
        (
            {"prompt": "a", "hint": "b " * 99},
            r"with it has \d+ tokens; data.max_prompt_tokens is 30",
        ),
    ],
)
def test_hints_that_cannot_be_given_are_refused(load, row, message):
    with pytest.raises(ConfigError, match=message):
        load([row], max_prompt_tokens=30)


PROMPTS = [Prompt(0, "a", None, {}), Prompt(1, "b", None, {}), Prompt(2, "a, hinted", None, {}, hint_of=0)]


def test_a_row_that_failed_wholly_comes_with_its_hint_once():
    hints = WithHints(PROMPTS, 0.5, None)
    cursor = PromptCursor(2, 0, shuffle=False, sampler=hints)
    assert [cursor.next(), cursor.next()] == [0, 1]
    hints.finished(0, 0, [0.0, 0.0])
    hints.finished(1, 1, [0.0, 0.0])
    assert hints.metrics() == {"hints/waiting_frac": 1}
    assert [cursor.next(), cursor.next()] == [2, 1], "row 1 has no hint"
    hints.finished(2, 2, [0.0, 1.0])
    assert [cursor.next(), cursor.next()] == [0, 1]
    hints.finished(3, 0, [0.0, 1.0])
    assert cursor.next() == 0


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.booleans()), max_size=8), st.randoms())
def test_what_hints_and_pass_rates_know_does_not_hang_on_the_order_of_the_groups(groups, random):
    def known(order):
        data = DataConfig(hints=HintsConfig(column="hint"), curriculum={})
        sampler = make_sampler(data, PROMPTS)
        for i in order:
            row, passed = groups[i]
            sampler.finished(i, row, [0.0, float(passed)])
        return [sampler.instead(row) for row in range(2)], sampler.metrics()

    shuffled = list(range(len(groups)))
    random.shuffle(shuffled)
    assert known(shuffled) == known(range(len(groups)))


def test_another_prompt_takes_its_place_and_all_else_keeps_its_token():
    kept = KeptSets.of([*[np.empty(0, np.int32)] * 5, np.array([8, 9], np.int32)])
    sampled = Trajectory(
        token_ids=np.array([1, 2, 3, 4, 7, 8], np.int32),
        loss_mask=np.array([0, 0, 0, 0, 1, 1], bool),
        behavior_logprobs=np.array([0, 0, 0, 0, -0.5, -0.25], np.float32),
        versions=(VersionSpan(4, 1, 0), VersionSpan(5, 1, 1)),
        finish_reason=FinishReason.STOP,
        reward=1.0,
        kept=kept,
    )
    trained = with_prompt(sampled, 4, np.array([1, 2], np.int32))
    assert trained.token_ids.tolist() == [1, 2, 7, 8]
    assert trained.behavior_logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert trained.token_versions().tolist() == [-1, -1, 0, 1]
    assert trained.kept.problem(trained.token_ids) is None
    assert trained.kept.sizes.tolist() == [0, 0, 0, 2]
    flat = flatten(Batch(1, 1, 0, (Group(0, 0, [trained]),)))
    assert flat.loss_mask.tolist() == [False, False, True, True]


def test_what_is_noted_for_the_trainer_counts_the_prompt_that_is_trained_on():
    sampled = Trajectory(
        token_ids=np.array([1, 2, 3, 4, 7, 8], np.int32),
        loss_mask=np.array([0, 0, 0, 0, 1, 1], bool),
        behavior_logprobs=np.zeros(6, np.float32),
        versions=(VersionSpan(4, 2, 0),),
        finish_reason=FinishReason.STOP,
    )
    task = RolloutTask(
        *(0, 0, 0, 0, "say", [1, 2, 3, 4], {"answer": "4"}, 1, SamplingParams(2)), trained_ids=[1, 2]
    )
    rollout = GroupRollout(
        None,
        Rewards(RewardConfig(), {}, max_steps=1, max_tokens=2, required=False),
        str,
        seed=0,
        group_size=1,
        note=ReferenceNotes(TOKENIZER, "answer", "", "", {8}),
    )
    response = Response(Session(task, 0, None, seed=0), [sampled], {"episode": [1.0]})
    [trained] = asyncio.run(rollout.score(task, [response])).trajectories
    assert trained.token_ids.tolist() == [1, 2, 7, 8]
    assert trained.metadata["reference"]["kept"] == 3, "of the prompt and the thinking"


REWARD = """
def needs_help(prompts, completions, **_):
    helped = "help" in prompts[0][-1]["content"]
    return [float(helped and i % 2) for i in range(len(completions))]
"""


@pytest.mark.parametrize("train", ["without", "with"])
def test_a_run_learns_from_what_was_sampled_with_a_hint(make_config, one_thread, tmp_path, train):
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "hint": "help"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = make_config("run.mode=inline", "run.steps=4", "staleness.max_staleness=0").model_dump(
        mode="python"
    )
    tree["data"] |= {"path": str(tmp_path / "rows.jsonl"), "hints": {"column": "hint", "train": train}}
    tree["reward"] = {"functions": [{"function": f"{tmp_path / 'reward.py'}:needs_help"}]}
    config = from_tree(tree)
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    assert [line["reward/mean"] for line in lines] == [0, 0, 0.5, 0.5]
    assert lines[1]["hints/waiting_frac"] == 1
    ratios = [line["mismatch/max_abs_log_ratio"] for line in lines]
    assert max(ratios[:2]) < 1e-4
    assert all(ratio > 1e-2 if train == "without" else ratio < 1e-4 for ratio in ratios[2:])
    with open_state(config, RunDir(tmp_path / "run")) as (prompts, store, _):
        batch = store.batch_of(3)
        assert len(batch) == 4
        for wire in batch:
            group = decode_group(wire)
            row = prompts[group.row]
            assert row.hint_of is not None
            ids = row.prompt_ids if train == "with" else prompts[row.hint_of].prompt_ids
            for t in group.trajectories:
                assert t.token_ids[: t.versions[0].start].tolist() == ids.tolist()


PREFIX_REWARD = """
def begun_well(completions, **_):
    return [float(c[0]["content"].startswith("ab") and i % 2) for i, c in enumerate(completions)]
"""
SELDOM = """
import zlib

def seldom(completions, **_):
    return [float(zlib.crc32(c[0]["content"].encode()) % 8 == 0) for c in completions]
"""


@pytest.fixture
def run_with_prefixes(make_config, one_thread, tmp_path):
    """Every batch of a run over eight rows, by this reward function; the prompts and the ledger's store."""

    @contextmanager
    def run_with_prefixes(reward, hints, steps):
        (tmp_path / "reward.py").write_text(reward)
        rows = [
            {"prompt": [{"role": "user", "content": f"say {i}"}], "solution": "abcdefgh"} for i in range(8)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = make_config("run.mode=inline", f"run.steps={steps}", "run.record=true").model_dump(
            mode="python"
        )
        tree["staleness"] = {"max_staleness": 0}
        tree["data"] |= {"path": str(tmp_path / "rows.jsonl"), "hints": {"give": "prefix", **hints}}
        name = re.search(r"def (\w+)", reward)[1]
        tree["reward"] = {"functions": [{"function": f"{tmp_path / 'reward.py'}:{name}"}]}
        config = from_tree(tree)
        run_dir = asyncrl.run(config, progress=False).run_dir
        with open_state(config, RunDir(run_dir)) as (prompts, store, _):
            batches = [[decode_group(wire) for wire in store.batch_of(step)] for step in range(steps)]
            yield config, prompts, store, batches

    return run_with_prefixes


def begun(prompts, group, trajectory):
    """What the policy was given of a response, and the whole response."""
    row = prompts[group.row]
    assert trajectory.token_ids[: len(row.prompt_ids)].tolist() == row.prompt_ids.tolist()
    first = trajectory.versions[0].start
    assert not trajectory.loss_mask[:first].any() and trajectory.loss_mask[first:].all()
    response = trajectory.token_ids[len(row.prompt_ids) :].tolist()
    return response[: first - len(row.prompt_ids)], response


def test_a_group_that_failed_goes_on_from_the_beginning_of_a_given_response(run_with_prefixes):
    """Which rewards see as a part of the response; it takes no more room than another one."""
    hints = {"column": "solution", "share": (0.25, 0.75)}
    with run_with_prefixes(PREFIX_REWARD, hints, 4) as (config, prompts, _, batches):
        solution, lengths = TOKENIZER.encode("abcdefgh"), set()
        for batch, is_begun in zip(batches, (False, False, True, True), strict=True):
            assert len(batch) == 4
            for group in batch:
                assert (prompts[group.row].hint_of is not None) == is_begun
                assert [t.reward for t in group.trajectories] == [float(is_begun and i % 2) for i in range(4)]
                for t in group.trajectories:
                    given, response = begun(prompts, group, t)
                    assert given == (solution[: len(given)] if is_begun else [])
                    assert len(response) <= config.rollout.max_new_tokens
                    if is_begun:
                        assert 2 <= len(given) <= 6
                        lengths.add(len(given))
        assert len(lengths) > 1


def test_a_row_that_fails_again_goes_on_from_its_own_last_success(run_with_prefixes):
    with run_with_prefixes(SELDOM, {"share": (0.5, 0.9)}, 16) as (_, prompts, store, batches):
        last, failed, groups_begun = {}, set(), 0
        for group in (group for batch in batches for group in batch):
            hint_of = prompts[group.row].hint_of
            plain = group.row if hint_of is None else hint_of
            assert (hint_of is not None) == (plain in failed and plain in last)
            for t in group.trajectories:
                given, _ = begun(prompts, group, t)
                assert given == last.get(plain, [])[: len(given)]
                assert bool(given) == (hint_of is not None)
            groups_begun += hint_of is not None
            successes = [t for t in group.trajectories if t.reward > 0.5]
            if successes:
                last[plain] = begun(prompts, group, successes[0])[1]
            failed = failed - {plain} if successes or hint_of is not None else failed | {plain}
        assert groups_begun > 1
        assert {row: store.success_of(row).tolist() for row in last} == last


def test_a_hint_cannot_be_taken_from_the_prompts_of_an_episode(make_config):
    with pytest.raises(ConfigError, match=r"a hint cannot be taken away; use data\.hints\.train=with"):
        make_config("data.hints={column: hint}", "rollout.episode=a:b")
