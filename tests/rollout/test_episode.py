"""Episodes of many requests, with a real engine: what they may do, and what becomes of those that fail."""

import asyncio
import itertools
import threading
from contextlib import suppress
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

import asyncrl
from asyncrl.config import RewardConfig
from asyncrl.core.records import Batch, FinishReason
from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import read_metrics
from asyncrl.reward.processes import shared_child, wire
from asyncrl.reward.processes.child import Child, ChildDied
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import EngineError, SamplingParams
from asyncrl.rollout.engines.torch.batch import ContinuousBatch
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.episode import single_turn
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.pool import EpisodePool, Line
from asyncrl.rollout.episodes.program import load_program
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.trainer.packing.batch import flatten

GROUP, TURN, CONTEXT = 4, 6, 40
TASK = RolloutTask(0, 0, 0, 0, "say", [5, 6, 7], {}, GROUP, SamplingParams(TURN))
SHOWN = [9, 10, 11, 12]


class LengthModel:
    """A reward model that scores by length."""

    async def score(self, prompt, response):
        return float(len(response))

    def drain_metrics(self):
        return {}


def letters(token_ids):
    return "".join(chr(ord("a") + i % 26) for i in token_ids)


PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


async def two_turns(task, model):
    first = await model.generate(task.prompt_ids)
    await model.generate([*task.prompt_ids, *first.token_ids, *SHOWN], max_new_tokens=3)


@pytest.fixture
def carry_out(make_qwen3):
    """Runs one group of an episode; gives it, the rollout and the model."""
    model = make_qwen3(vocab_size=32)

    def carry_out(
        episode,
        watch=None,
        *,
        task=TASK,
        chat=None,
        max_turns=None,
        rewards=None,
        models=None,
        max_tokens=TURN,
        capacity=GROUP,
        **settings,
    ):
        """episode: of the worker's, or what `rollout.episode` may name. rewards: settings."""

        async def run():
            engine = TorchEngine(model, capacity=capacity, max_length=CONTEXT)
            pool = None
            if isinstance(episode, str):
                limit_s = settings.pop("timeout_s", 60.0)
                pool = EpisodePool(episode, letters, processes=1, timeout_s=limit_s)
                await pool.start()
            scoring = Rewards(
                RewardConfig.model_validate({"models": [{"path": "judge"}]} if rewards is None else rewards),
                {"judge": LengthModel()} if rewards is None else models or {},
                max_steps=1,
                max_tokens=max_tokens,
            )
            rollout = GroupRollout(
                *(engine, scoring, letters),
                seed=3,
                group_size=GROUP,
                episode=pool or episode,
                session=partial(Conversation, chat=chat, max_turns=max_turns),
                context_tokens=CONTEXT,
                end_episodes=pool and pool.close,
                **settings,
            )
            driving = asyncio.create_task(engine.run())
            watching = asyncio.create_task(watch(rollout)) if watch else None
            try:
                return await rollout.score(task, await rollout.generate(task))
            finally:
                if watching:
                    await watching
                await rollout.aclose()
                await asyncio.gather(driving, return_exceptions=True)

        return asyncio.run(run()), model

    return carry_out


def test_what_the_trainer_is_told_of_a_trajectory_is_of_the_prompt_that_is_trained_on(carry_out):
    """Notes name places of tokens, which a hint that is taken away moves."""
    task = replace(TASK, prompt_ids=[5, 6, 7, 8, 9], trained_ids=[5, 6])
    group, _ = carry_out(
        single_turn,
        task=task,
        note=lambda columns, trajectory: {"at": int(trajectory.loss_mask.argmax())},
    )
    assert [t.metadata["at"] for t in group.trajectories] == [2] * GROUP
    assert [t.token_ids[:2].tolist() for t in group.trajectories] == [[5, 6]] * GROUP


def test_an_episode_knows_a_row_by_its_number_also_where_that_comes_with_a_hint(carry_out, tmp_path):
    (tmp_path / "which.py").write_text(
        "async def row(task, model):\n    await model.generate(task.prompt_ids)\n    return float(task.row)\n"
    )
    for task, row in ((replace(TASK, row=2), 2.0), (replace(TASK, row=12, hint_of=3), 3.0)):
        group, _ = carry_out(f"{tmp_path / 'which.py'}:row", task=task, rewards={})
        assert [t.reward for t in group.trajectories] == [row] * GROUP
        assert group.row == task.row


def test_two_turns_are_one_exact_trajectory_with_what_was_shown_masked(carry_out):
    group, model = carry_out(two_turns)
    assert len({t.token_ids.tobytes() for t in group.trajectories}) > 1, "all members sampled alike"
    for t in group.trajectories:
        shown_at = len(TASK.prompt_ids) + t.versions[0].length
        assert t.token_ids[shown_at : shown_at + len(SHOWN)].tolist() == SHOWN
        assert not t.loss_mask[shown_at : shown_at + len(SHOWN)].any()
        assert t.loss_mask.sum() == t.sampled_tokens == sum(span.length for span in t.versions)
        with torch.inference_mode():
            logits = model(torch.from_numpy(t.token_ids)[None].long()).logits[0]
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(t.token_ids[1:, None]).long())[:, 0]
        found = torch.from_numpy(t.behavior_logprobs)[1:]
        mask = torch.from_numpy(t.loss_mask)[1:]
        assert torch.allclose(found[mask], expected[mask], atol=1e-5)
        assert (found[~mask] == 0).all()
        assert t.reward == len(t.token_ids) - len(TASK.prompt_ids), "rewards read all that follows the prompt"
    flat = flatten(Batch(0, 0, 0, (group,)))
    assert flat.loss_mask.sum() == sum(t.sampled_tokens for t in group.trajectories)


@pytest.mark.parametrize("turns", [1, 2])
def test_what_an_episode_of_many_turns_has_left_makes_place_first(carry_out, turns, monkeypatch):
    """Of one turn it begins with the prompt of its group, whose other members may yet need it."""
    given_up = []
    abort = TorchEngine.abort
    monkeypatch.setattr(TorchEngine, "abort", lambda self, name: (given_up.append(name), abort(self, name)))
    carry_out(single_turn if turns == 1 else two_turns)
    names = {f"{TASK.lease_id}/{i}{turn}" for i in range(GROUP) for turn in ("", "/1")}
    assert (given_up == []) if turns == 1 else (set(given_up) == names)


def test_an_episode_that_waits_for_something_else_holds_no_slot(carry_out):
    door = asyncio.Event()

    async def waits_between(task, model):
        first = await model.generate(task.prompt_ids)
        await door.wait()
        await model.generate([*task.prompt_ids, *first.token_ids])

    async def watch(rollout):
        await asyncio.sleep(0)
        assert rollout.room == 1, "only the place at the door: every slot is taken"
        while rollout.progress(TASK.lease_id).elsewhere < GROUP:
            await asyncio.sleep(0)
        assert rollout.progress(TASK.lease_id).generating == 0
        assert rollout.room == 2
        await rollout.has_room()
        door.set()

    group, _ = carry_out(waits_between, watch)
    assert all(len(t.versions) == 2 for t in group.trajectories)


def test_progress_follows_every_change_of_a_member(carry_out):
    """It is asked for at every token, so it is counted anew only after a change."""
    rollouts, seen = [], []

    async def watch(rollout):
        rollouts.append(rollout)

    async def episode(task, model):
        def look():
            seen.append(astuple(rollouts[0].progress(TASK.lease_id)))

        look()
        with model.standing_back():
            look()
        look()
        await model.generate(task.prompt_ids)
        look()
        both = [asyncio.create_task(model.generate(task.prompt_ids)) for _ in range(2)]
        await asyncio.sleep(0)
        look()
        await asyncio.gather(*both)
        look()

    carry_out(episode, watch, task=replace(TASK, group_size=1))
    assert seen == [(1, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (2, 0, 0), (0, 1, 0)]
    assert astuple(rollouts[0].progress(TASK.lease_id)) == (0, 0, 0)


def test_requests_of_one_episode_may_run_side_by_side_and_are_segments_of_one_member(carry_out):
    seen = []

    async def best_of_two(task, model):
        found = await asyncio.gather(*(model.generate(task.prompt_ids) for _ in range(2)))
        seen.append([c.token_ids.tolist() for c in found])
        return float(max(len(c.token_ids) for c in found))

    group, _ = carry_out(best_of_two)
    assert all(a != b for a, b in seen), "each request has a seed of its own"
    assert [t.segment for t in group.trajectories] == [0, 1] * GROUP
    assert all(t.reward == t.reward_parts["episode"] == TURN for t in group.trajectories)
    assert len(group.summary().rewards) == GROUP, "a member's reward counts once"
    assert not any("split" in t.metadata for t in group.trajectories), "nothing was written anew"


def test_a_full_context_ends_an_episode_and_no_engine(carry_out):
    async def fills(task, model):
        ids = list(task.prompt_ids)
        while len((last := await model.generate(ids)).token_ids):
            ids += last.token_ids.tolist()
        assert last.finish_reason is FinishReason.LENGTH

    group, _ = carry_out(fills)
    for t in group.trajectories:
        assert len(t.token_ids) == CONTEXT
        assert t.finish_reason is FinishReason.LENGTH


async def fails_after_a_turn(task, model):
    await model.generate(task.prompt_ids)
    raise ConnectionError("the tool is away")


async def returns_text(task, model):
    await model.generate(task.prompt_ids)
    return "done"


async def returns_too_many(task, model):
    await model.generate(task.prompt_ids)
    return [0.0, 1.0]


async def samples_nothing(task, model):
    return 1.0


async def asks_too_much(task, model):
    await model.generate([5] * 9999)
    return 1.0


@pytest.mark.parametrize(
    ("episode", "reason", "detail", "tokens"),
    [
        (fails_after_a_turn, "episode: ConnectionError", "the tool is away", GROUP),
        (returns_text, "episode: TypeError", "it returned 'done'; it should return a finite number", GROUP),
        (returns_too_many, "episode: ValueError", "2 rewards for 1 requests", GROUP),
        (samples_nothing, "episode: ValueError", "the policy sampled nothing", 0),
        (
            asks_too_much,
            "episode: ValueError",
            r"a prompt has 9,999 tokens or more, and the context \(roll",
            0,
        ),
    ],
)
def test_an_episode_that_fails_costs_an_attempt_and_its_tokens_are_counted(
    carry_out, episode, reason, detail, tokens
):
    with pytest.raises(AttemptFailed, match=detail) as caught:
        carry_out(episode)
    assert caught.value.reason == reason
    assert caught.value.sampled_tokens >= tokens


def test_a_request_that_outlives_its_episode_is_taken_out_of_the_engine(carry_out, monkeypatch):
    """The engine takes no step before that: on a busy machine it might be through with the request."""
    late, names, all_given_up = [], set(), threading.Event()
    abort, step = TorchEngine.abort, ContinuousBatch.step

    def noted(self, name):
        abort(self, name)
        names.add(name)
        if len(names) == GROUP:
            all_given_up.set()

    def held(self):
        assert all_given_up.wait(60)
        return step(self)

    monkeypatch.setattr(TorchEngine, "abort", noted)
    monkeypatch.setattr(ContinuousBatch, "step", held)

    async def forgets(task, model):
        request = asyncio.ensure_future(model.generate(task.prompt_ids))
        late.append((request, model))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        raise ConnectionError("the tool is away")

    async def watch(rollout):
        while rollout.room < 2:
            await asyncio.sleep(0)
        await asyncio.wait([request for request, _ in late])

    with pytest.raises(AttemptFailed, match="the tool is away"):
        carry_out(forgets, watch)
    assert [request.result().finish_reason for request, _ in late] == [FinishReason.ABORT] * GROUP

    async def ask_again():
        await late[0][1].generate(TASK.prompt_ids)

    with pytest.raises(RuntimeError, match="asked after its episode had ended"):
        asyncio.run(ask_again())


async def asks(task, model):
    await model.generate(task.prompt_ids)


async def shrugs(task, model):
    with suppress(EngineError):
        await model.generate(task.prompt_ids)


@pytest.mark.parametrize("episode", [asks, shrugs])
def test_a_failure_of_the_engine_is_not_the_episodes(carry_out, episode, monkeypatch):
    def broken(engine, request):
        raise EngineError("its GPU is gone")

    monkeypatch.setattr(TorchEngine, "generate", broken)
    with pytest.raises(ExceptionGroup) as caught:
        carry_out(episode)
    assert caught.group_contains(EngineError)


NOT_ASYNC = "def episode(task, model):\n    pass\n"
TAKES_ONE = "async def episode(task):\n    pass\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NOT_ASYNC, r"must be `async def`"),
        (TAKES_ONE, r"called with \(task, model\)"),
        ("", "it defines no function"),
    ],
)
def test_an_episode_that_could_not_run_is_refused(tmp_path, text, message):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_program(f"{file}:episode")


def test_the_example_of_the_docs_runs_as_it_is_written(carry_out, tmp_path):
    text = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    shorter = text.replace("[271, 14209, 448]", str(SHOWN))
    assert shorter != text, "the model of this test has a smaller vocabulary"
    (tmp_path / "episode.py").write_text(shorter)
    group, _ = carry_out(f"{tmp_path / 'episode.py'}:twice")
    for t in group.trajectories:
        assert t.loss_mask.sum() == len(t.token_ids) - len(TASK.prompt_ids) - len(SHOWN)


OWN = """
async def echo(task, model):
    '''The model writes, is shown its own first token thrice, and writes again.'''
    first = await model.generate(task.prompt_ids, max_new_tokens=4)
    shown = [first.token_ids[0]] * 3
    await model.generate([*task.prompt_ids, *first.token_ids, *shown], max_new_tokens=4)
"""


HANGS = """
import asyncio

async def hangs(task, model):
    await model.generate(task.prompt_ids)
    await asyncio.sleep(3600)
"""


def test_an_inline_run_does_not_wait_for_an_episode_for_ever(make_config, one_thread, tmp_path, monkeypatch):
    """By a clock that goes on by a second with every look at it."""
    (tmp_path / "own.py").write_text(HANGS)
    config = make_config("run.mode=inline", f"rollout.episode={tmp_path / 'own.py'}:hangs")
    clock = SimpleNamespace(monotonic=partial(next, itertools.count()))
    monkeypatch.setattr("asyncrl.loop.inline.time", clock)
    with pytest.raises(asyncrl.RunFailed, match=r"an episode has kept the run waiting for .* time limit"):
        asyncrl.run(config, progress=False)


@pytest.mark.slow
def test_a_run_trains_on_an_episode_of_the_users_own(make_config, one_thread, tmp_path):
    """Twice the same, to the last bit, on the schedule that depends on nothing but the seeds."""
    (tmp_path / "own.py").write_text(OWN)
    found = []
    for i in range(2):
        config = make_config(
            *("run.mode=inline", "run.steps=3", f"run.dir={tmp_path / str(i)}", "rollout.slots=6"),
            *(f"rollout.episode={tmp_path / 'own.py'}:echo", "rollout.max_sequence_tokens=64"),
        )
        result = asyncrl.run(config, progress=False)
        names = "reward/mean", "episodes/computed_again_frac"
        lines = read_metrics(result.run_dir / "metrics.jsonl")
        found.append([[line[name] for name in names] for line in lines])
    assert len(found[0]) == 3
    assert all(0 <= again < 0.5 for _, again in found[0])
    assert np.isfinite(found).all()
    assert found[0] == found[1]


PROGRAMS = """
import asyncio, os, signal, time
from pathlib import Path

FLAG = Path(__file__).with_name("flag")


async def by_turns(task, model):
    first = await model.generate(task.prompt_ids, max_new_tokens=2)
    second = await model.generate([*task.prompt_ids, *first.token_ids, 9], max_new_tokens=2)
    assert second.text == "".join(chr(ord("a") + i % 26) for i in second.token_ids)
    return [1.0, task.member]


async def in_parts(task, model):
    first = await model.generate(task.prompt_ids, max_new_tokens=2)
    await model.generate([*task.prompt_ids, *first.token_ids, 9], max_new_tokens=2)
    return [{"won": 0.0, "brief": 0.5}, {"won": task.member, "odd": task.member % 2}]


async def best_of(task, model):
    drafts = await asyncio.gather(*(model.generate(task.prompt_ids, train=False) for _ in range(3)))
    await model.generate([*task.prompt_ids, *drafts[0].token_ids])
    return 0.5


async def raises(task, model):
    await model.generate(task.prompt_ids)
    raise ConnectionError("the tool is away")


async def waits(task, model):
    await model.generate(task.prompt_ids)
    await asyncio.sleep(3600)


async def killed(task, model):
    await model.generate(task.prompt_ids)
    if task.member == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


async def killed_once(task, model):
    await model.generate(task.prompt_ids)
    if task.member == 1 and not FLAG.exists():
        FLAG.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


async def blocks(task, model):
    await model.generate(task.prompt_ids)
    if task.member == 0:
        time.sleep(3600)
    return 1.0


async def asks_for_what_is_not(task, model):
    await model.generate([10**6])


async def asks_with_an_object(task, model):
    await model.chat([{"role": "user", "content": object()}])


async def asks_wrongly(task, model):
    try:
        await model.generate([])
    except RuntimeError as error:
        assert "empty prompt" in str(error)
    await model.generate(task.prompt_ids)


async def says_nothing(task, model):
    await model.generate(task.prompt_ids)


async def goes_on(task, model):
    ids = list(task.prompt_ids)
    while (more := await model.generate(ids, max_new_tokens=2)).token_ids:
        ids += more.token_ids
    assert more.finish_reason == "length"
    return float(len(ids))
"""


REWARDLESS = "reward function `episode`: it returned no reward, and the run has nothing else that scores"


@pytest.fixture
def program(tmp_path):
    (tmp_path / "programs.py").write_text(PROGRAMS)
    return lambda name: f"{tmp_path / 'programs.py'}:{name}"


def test_an_episode_in_its_process_earns_by_turns(carry_out, program):
    group, _ = carry_out(program("by_turns"))
    assert len(group.trajectories) == GROUP
    for member, t in enumerate(group.trajectories):
        assert t.reward == 1.0 + member
        ends = np.flatnonzero(t.loss_mask & ~np.append(t.loss_mask[1:], False)).tolist()
        assert t.turn_rewards == ((ends[0], 1.0), (ends[1], float(member)))
        assert len(t.token_ids) == len(TASK.prompt_ids) + 2 + 1 + 2


def test_the_parts_that_an_episode_names_are_summed_as_the_config_says(carry_out, program):
    parts = {"won": {"weight": 2.0}, "odd": {"gate": "won", "weight": 10.0}}
    group, _ = carry_out(program("in_parts"), rewards={"episode": parts})
    for member, t in enumerate(group.trajectories):
        odd = float(member % 2)
        assert t.reward_parts == {"won": float(member), "brief": 0.5, "odd": odd}
        assert t.reward == 2.0 * member + 0.5 + 10.0 * odd
        assert [number for number, _ in t.turns] == [0, 1]
        assert t.turn_parts == {"won": (0.0, float(member)), "brief": (0.5, 0.0), "odd": (0.0, odd)}
        ends = np.flatnonzero(t.loss_mask & ~np.append(t.loss_mask[1:], False)).tolist()
        assert t.turn_rewards == ((ends[0], 0.5), (ends[1], 2.0 * member + 10.0 * odd))


BY_TURNS = """
async def play(task, model):
    first = await model.generate(task.prompt_ids, max_new_tokens=3)
    second = await model.generate([*task.prompt_ids, *first.token_ids, 9], max_new_tokens=3)
    turns = [first.token_ids, second.token_ids]
    return [{"even": sum(i % 2 == 0 for i in ids), "low": float(min(ids))} for ids in turns]
"""


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["turn_gae", "turn_grpo"])
def test_a_run_gives_credit_by_turn(make_config, one_thread, tmp_path, advantage):
    (tmp_path / "own.py").write_text(BY_TURNS)
    config = make_config(
        *("run.mode=inline", "run.steps=2", "rollout.slots=6", "rollout.max_sequence_tokens=64"),
        *(f"rollout.episode={tmp_path / 'own.py'}:play", "reward.functions=[]", "trainer.mini_batches=2"),
        "reward.episode={even: {standardise: group}, low: {standardise: true, weight: 0.5}}",
        *(f"objective.advantage={advantage}", "objective.gamma=0.9"),
        *(["critic={}", "objective.lam=0.9"] if advantage == "turn_gae" else []),
    )
    result = asyncrl.run(config, progress=False)
    last = read_metrics(result.run_dir / "metrics.jsonl")[-1]
    assert last["reward/even/std"] > 0
    assert last["reward/low/running_std"] > 0
    assert last["adv/std"] > 0
    assert ("critic/target_mean" in last) == (advantage == "turn_gae")
    assert all(s.parts.keys() == {"even", "low"} for s in asyncrl.read_samples(result.run_dir))


def test_what_an_episode_shows_is_no_part_of_an_overlong_response(carry_out):
    """Of 6 + 3 sampled tokens, one is beyond the 8 that cost nothing; the 4 that were shown are no matter."""
    models = {"models": [{"path": "judge"}], "overlong": {"buffer_tokens": 4}}
    group, _ = carry_out(two_turns, rewards=models, models={"judge": LengthModel()}, max_tokens=12)
    assert all(
        t.loss_mask.sum() == TURN + 3 < len(t.token_ids) - len(TASK.prompt_ids) for t in group.trajectories
    )
    assert [t.reward_parts["overlong"] for t in group.trajectories] == [-1 / 4] * GROUP


def test_what_is_not_to_be_trained_on_is_context(carry_out, program):
    group, _ = carry_out(program("best_of"))
    for t in group.trajectories:
        assert t.segment == 0
        assert t.loss_mask.sum() == TURN == t.sampled_tokens
        assert len(t.token_ids) == len(TASK.prompt_ids) + 2 * TURN


@pytest.mark.parametrize(
    ("name", "reason", "detail", "settings"),
    [
        ("raises", "episode: ConnectionError", "the tool is away", {}),
        (
            *("blocks", "episode: time-out"),
            r"programs.py:blocks`: it took longer than rollout.episode_timeout_s=2, .* in blocks \(.*, line ",
            {"timeout_s": 2.0},
        ),
        ("killed", "episode: process died", "killed by SIGKILL", {}),
        ("says_nothing", REWARDLESS, "nothing else that scores", {"rewards": {}}),
    ],
)
def test_an_episode_at_fault_costs_an_attempt_and_leaves_nothing(
    carry_out, program, name, reason, detail, settings
):
    with pytest.raises(AttemptFailed, match=detail) as caught:
        carry_out(program(name), **settings)
    assert caught.value.reason == reason
    assert caught.value.sampled_tokens >= GROUP * TURN, "what was sampled is counted"


def test_an_episode_that_takes_too_long_costs_an_attempt_and_leaves_nothing(carry_out, program, monkeypatch):
    """Time stands still until the model has answered all: a busy machine may ask it late."""
    answered, tell = [], EpisodePool._tell
    monkeypatch.setattr(EpisodePool, "_tell", lambda *what: (answered.append(what), tell(*what)))
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * (len(answered) >= GROUP))
    monkeypatch.setattr("asyncrl.reward.processes.shared_child.time", clock)
    with pytest.raises(AttemptFailed, match=r"longer than rollout.episode_timeout_s=0.3") as caught:
        carry_out(program("waits"), timeout_s=0.3)
    assert caught.value.reason == "episode: time-out"
    assert caught.value.sampled_tokens >= GROUP * TURN, "what was sampled is counted"


def test_a_second_run_of_an_episode_has_no_more_time_for_what_the_first_has_waited(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("asyncrl.waits.time.monotonic", lambda: now_s)
    session = Conversation(TASK, 0, None, seed=0)
    session.waited.begin()
    now_s = 100.0
    session.waited.end()
    line = Line(session, letters, lambda *_: None)
    assert line.waited_s == 0
    session.waited.begin()
    now_s = 107.0
    assert line.waited_s == 7.0


class Heard(Child):
    """A process of which nothing is but what it is told."""

    alive, death = True, ChildDied("not yet")

    def __init__(self):
        super().__init__()
        self.told = []

    def tell(self, request):
        self.told.append(msgspec.msgpack.decode(request[wire.HEADER_BYTES :], type=wire.Request))

    def kill(self): ...


@pytest.mark.parametrize("end", ["cancelled", "raised"])
def test_an_episode_that_asks_once_it_is_given_up_is_told_so(end):
    """Else what it does at its end would wait for ever, and keep what it holds."""

    async def run():
        child, session = Heard(), Conversation(TASK, 0, None, seed=0)
        pool = EpisodePool("own.py:any", letters, processes=1, timeout_s=60.0)
        playing = asyncio.create_task(pool._ask(pool._shared_by(child), TASK, session))
        await asyncio.sleep(0)
        (play,) = child.told
        if end == "cancelled":
            playing.cancel()
        else:
            child.received(wire.frame(wire.Raised(play.number, "KeyError: 1", "")))
        await asyncio.wait([playing])
        child.received(wire.frame(wire.Asks(play.number, [wire.Ask(3, "generate", {})], withdrawn=[2])))
        told = child.told[-1]
        assert (told.number, told.ask) == (play.number, 3)
        assert "asked after its episode had ended" in told.error

    asyncio.run(run())


def test_where_an_episode_blocks_is_told_also_if_that_is_known_only_when_its_time_is_up(monkeypatch):
    monkeypatch.setattr(shared_child, "CANCEL_S", 0.0)

    class Blocked(Heard):
        def tell(self, request):
            super().tell(request)
            if isinstance(self.told[-1], wire.Cancel):
                self.received(wire.frame(wire.Stuck(1, "play (own.py, line 7)", 1.0)))

    with pytest.raises(TimeoutError, match=r"play \(own.py, line 7\)"):
        asyncio.run(shared_child.SharedChild(Blocked()).ask(wire.frame(wire.Told(1, 0, None)), 1, 0.0))


def test_a_process_that_dies_costs_its_other_episodes_nothing(carry_out, program):
    group, _ = carry_out(program("killed_once"))
    assert [t.reward for t in group.trajectories] == [1.0] * GROUP
    assert [t.segment for t in group.trajectories] == [0] * GROUP, "only the last run of each is trained on"


def test_the_engines_refusal_of_a_request_is_told_to_the_episode_and_is_no_failure_of_the_engine(
    carry_out, program
):
    group, _ = carry_out(program("asks_wrongly"))
    assert all(t.sampled_tokens for t in group.trajectories)
    with pytest.raises(AttemptFailed, match="vocabulary"):
        carry_out(program("asks_for_what_is_not"))
    with pytest.raises(AttemptFailed, match="what it asks the model for cannot be sent: a value of type obj"):
        carry_out(program("asks_with_an_object"))


def test_turns_beyond_the_limit_cut_a_response_off(carry_out, program):
    group, _ = carry_out(program("goes_on"), max_turns=3)
    for t in group.trajectories:
        assert t.finish_reason is FinishReason.LENGTH
        assert t.loss_mask.sum() == 6
        assert t.reward == len(t.token_ids)


def test_the_bound_holds_for_the_oldest_token_of_the_oldest_turn(make_config, one_thread, tmp_path):
    """With few slots, episodes go on while weights are swapped."""
    (tmp_path / "own.py").write_text(OWN.replace("max_new_tokens=4", "max_new_tokens=10"))
    config = make_config(
        *("run.mode=inline", "run.steps=8", "rollout.slots=5", "staleness.max_staleness=1"),
        *(f"rollout.episode={tmp_path / 'own.py'}:echo", "rollout.max_sequence_tokens=64"),
    )
    run_dir = asyncrl.run(config, progress=False).run_dir
    assert max(line["staleness/max"] for line in read_metrics(run_dir / "metrics.jsonl")) == 1
    assert any(first < last for first, last in (s.versions for s in asyncrl.read_samples(run_dir)))
