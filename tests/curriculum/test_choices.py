"""More responses are sampled than a group has: which belong to it, and that every token is in the books."""

import asyncio
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asyncrl
from asyncrl.config import RewardConfig, RolloutConfig
from asyncrl.core.records import FinishReason, Purpose
from asyncrl.curriculum.choices import make_choice, max_variance
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.observe.metrics import read_metrics
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.episode import single_turn
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.user_files import look_at_functions

SIZE, CANDIDATES, LONGEST = 3, 8, 24


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=9), st.data())
def test_no_other_choice_has_a_greater_variance(rewards, data):
    size = data.draw(st.integers(1, len(rewards)))
    chosen = max_variance(size, rewards, [], {})
    assert len(set(chosen)) == size
    best = max(np.var([rewards[i] for i in some]) for some in combinations(range(len(rewards)), size))
    assert np.var([rewards[i] for i in chosen]) == pytest.approx(best)


class Judge:
    """Scores by length. fails_on: the calls that fail."""

    def __init__(self, fails_on):
        self.fails_on, self.calls = fails_on, 0

    async def score(self, prompt, response):
        self.calls += 1
        if self.calls in self.fails_on:
            raise RewardError("judge", "the score is nan", 1, kind="model")
        return float(len(response))

    def drain_metrics(self):
        return {}


def letters(token_ids):
    return "".join(chr(ord("a") + i % 26) for i in token_ids)


async def step(engine):
    """For ever, in turn with what is told of each step: in a thread of its own the engine may be through with
    everything before anybody on a busy machine hears of the first that is done."""
    while True:
        if engine.stats().running + engine.stats().waiting:
            engine.step()
        await asyncio.sleep(0)


@pytest.fixture
def carry_out(make_qwen3):
    """Runs one group of `SIZE`; gives it, all sampled tokens, and the calls of the judge."""

    def carry_out(choose, *, fails_on=(), episode=single_turn, purpose=Purpose.TRAIN):
        candidates = None if choose == "greedy_baseline" else CANDIDATES
        config = RolloutConfig(group_size=SIZE, candidates=candidates, choose=choose)

        async def run():
            engine = TorchEngine(make_qwen3(vocab_size=16), capacity=config.sampled, max_length=64)
            judge, scoring = Judge(fails_on), RewardConfig.model_validate({"models": [{"path": "judge"}]})
            rollout = GroupRollout(
                engine,
                Rewards(scoring, {"judge": judge}, max_steps=1, max_tokens=LONGEST),
                letters,
                seed=3,
                group_size=config.sampled,
                choice=make_choice(config),
                episode=episode,
            )
            driving = asyncio.create_task(step(engine))
            try:
                sampling = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=(1,))
                task = RolloutTask(0, 0, 0, 0, "say", [5, 6], {}, SIZE, sampling, purpose)
                responses = await rollout.generate(task)
                assert rollout.room == 2, "something is still being sampled"
                tokens = sum(response.session.sampled_tokens for response in responses)
                return await rollout.score(task, responses), tokens, judge.calls
            finally:
                driving.cancel()
                await engine.close()

        return asyncio.run(run())

    return carry_out


def lengths(group):
    return sorted(t.sampled_tokens for t in group.trajectories)


def test_those_that_are_done_first_are_the_group_and_the_others_are_cut_short(carry_out):
    everybody, all_tokens, _ = carry_out("max_variance")
    by_length = sorted([*lengths(everybody), *map(int, everybody.left_out.rewards)])
    assert len(set(by_length)) > SIZE, "the responses do not differ in length"
    group, tokens, scored = carry_out("first")
    assert lengths(group) == by_length[:SIZE]
    assert all(t.finish_reason is FinishReason.STOP for t in group.trajectories)
    assert scored == SIZE, "a response that was cut short was scored"
    assert group.left_out.rewards == ()
    assert sum(lengths(group)) + group.left_out.tokens == tokens < all_tokens
    cut_at = lengths(group)[-1]
    assert (CANDIDATES - SIZE) * (cut_at - 1) <= group.left_out.tokens, "tokens were not counted"


def test_what_was_scored_and_not_chosen_is_told(carry_out):
    group, tokens, scored = carry_out("max_variance")
    assert scored == CANDIDATES
    assert len(group.left_out.rewards) == CANDIDATES - SIZE
    assert sum(lengths(group)) + group.left_out.tokens == tokens
    assert sum(group.left_out.rewards) == group.left_out.tokens, "the judge scores by length"


def test_a_response_that_fails_is_left_out_while_enough_others_are_sound(carry_out):
    group, tokens, _ = carry_out("max_variance", fails_on=(1, 2, 3, 4, 5))
    assert len(group.trajectories) == SIZE
    assert group.left_out.rewards == ()
    assert sum(lengths(group)) + group.left_out.tokens == tokens
    for choose, fails_on in (("max_variance", (1, 2, 3, 4, 5, 6)), ("first", (2,))):
        with pytest.raises(AttemptFailed, match="the score is nan") as caught:
            carry_out(choose, fails_on=fails_on)
        assert caught.value.sampled_tokens > 0


def test_an_episode_that_fails_does_not_count_as_done(carry_out):
    async def some_fail(task, session):
        if session.index % 2:
            raise ValueError("odd")
        return await single_turn(task, session)

    group, _, _ = carry_out("first", episode=some_fail)
    assert len(group.trajectories) == SIZE


def test_an_episode_that_waits_for_something_else_is_cut_short_too(carry_out):
    async def some_wait(task, session):
        await single_turn(task, session)
        if session.index >= SIZE:
            await asyncio.Event().wait()

    group, tokens, _ = carry_out("first", episode=some_wait)
    assert len(group.trajectories) == SIZE
    assert sum(lengths(group)) + group.left_out.tokens == tokens


def test_what_is_not_trained_on_has_no_candidates(carry_out):
    group, _, scored = carry_out("first", purpose=Purpose.EVAL)
    assert len(group.trajectories) == scored == SIZE
    assert group.left_out.tokens == 0


def test_a_greedy_response_is_scored_beside_the_group_and_left_out_of_it(carry_out, make_qwen3):
    sampled = {}

    async def seen(task, session):
        sampled[session.index] = (await session.generate(task.prompt_ids)).token_ids.tolist()

    group, tokens, scored = carry_out("greedy_baseline", episode=seen)
    model, likeliest = make_qwen3(vocab_size=16), [5, 6]
    while len(likeliest) < 2 + LONGEST and likeliest[-1] != 1:
        likeliest.append(int(model(input_ids=torch.tensor([likeliest])).logits[0, -1].argmax()))
    assert sampled[SIZE] == likeliest[2:]
    assert all(sampled[i] != likeliest[2:] for i in range(SIZE))
    assert lengths(group) == sorted(len(sampled[i]) for i in range(SIZE))
    assert group.left_out.rewards == (group.left_out.tokens,) == (len(likeliest) - 2,)
    assert (sum(lengths(group)) + group.left_out.tokens, scored) == (tokens, SIZE + 1)
    for failing in (1, SIZE + 1):  # whichever it is, none can be done without
        with pytest.raises(AttemptFailed, match="the score is nan"):
            carry_out("greedy_baseline", fails_on=(failing,))
    evaluated, _, _ = carry_out("greedy_baseline", purpose=Purpose.EVAL)
    assert (len(evaluated.trajectories), evaluated.left_out.tokens) == (SIZE, 0)


OWN = """
def longest(rewards, tokens, size, level=None):
    return sorted(range(len(tokens)), key=lambda i: -tokens[i])[:size]


def longest_by_numpy(tokens, size):
    import numpy as np

    return np.argsort(tokens)[-size:]


def same(rewards, size, **_):
    return [0] * size


def outside(rewards, size, **_):
    return [len(rewards) + i for i in range(size)]


def few(rewards, size, **_):
    return [0]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


@pytest.mark.parametrize("name", ["longest", "longest_by_numpy"])
def test_a_choice_of_the_users_own(carry_out, own, name):
    group, _, _ = carry_out(own(name))
    assert min(lengths(group)) >= max(group.left_out.rewards)


@pytest.mark.parametrize("name", ["same", "outside", "few"])
def test_a_choice_of_the_users_own_that_is_none_ends_the_run(carry_out, own, name):
    with pytest.raises(RunFailed, match=rf"own\.py:{name}` returned .* 3 different indices of 8 responses"):
        carry_out(own(name))


@pytest.mark.parametrize(
    "chosen",
    [
        ["rollout.candidates=7", "data.curriculum={success_above: 0.1}"],
        [
            *("objective.advantage=remax", "rollout.choose=greedy_baseline"),
            *("objective.entropy_target=0.5", "objective.entropy_coef=0.001"),
        ],
    ],
)
def test_an_inline_run_with_candidates_repeats_and_its_books_close(make_config, one_thread, tmp_path, chosen):
    ends = []
    for i in range(2):
        config = make_config(
            *("run.mode=inline", "run.steps=4", f"run.dir={tmp_path / str(i)}", "rollout.slots=10"),
            *chosen,
        )
        ends.append(read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")[-1])
    first, second = ({k: v for k, v in end.items() if not k.startswith(("time", "wall"))} for end in ends)
    assert first["grad_norm"] == second["grad_norm"]
    assert first["ledger/dropped_tokens"] == second["ledger/dropped_tokens"] > 0
    assert first["ledger/dropped_groups"] == 0
    tokens = ("trained", "masked", "dropped", "failed", "in_flight")
    assert first["ledger/generated_tokens"] == sum(first[f"ledger/{where}_tokens"] for where in tokens)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.candidates=4"], "of so many responses rollout.group_size=4 are chosen; use more"),
        (["rollout.choose=max_variance"], "has nothing to choose from; set rollout.candidates to more than"),
        (
            ["rollout.candidates=9", "rollout.choose=last"],
            "there are first, max_variance, greedy_baseline, and your",
        ),
        (
            ["rollout.candidates=9", "run.mode=inline", "rollout.episode=a:b"],
            "which episode is done first hangs on how fast its process is",
        ),
        (
            ["rollout.candidates=9", "rollout.choose=max_variance", "rollout.group_size=1"],
            "a single response has no variance",
        ),
    ],
)
def test_candidates_that_cannot_be_are_refused(make_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_choices_that_are_not_there_are_refused_before_anything_starts(make_config, own):
    config = make_config(
        *("rollout.candidates=9", f"rollout.choose={own('longets')}", f"objective.filter={own('kepe')}"),
        f"data.curriculum.sampler={own('few')}",
    )
    found = look_at_functions(config)
    told = [problem.what for problem in found.problems]
    assert ["objective.filter" in told[0], "rollout.choose" in told[1], len(told)] == [True, True, 2]
    assert "did you mean `longest`" in told[1]
    assert own("few") in found.files
