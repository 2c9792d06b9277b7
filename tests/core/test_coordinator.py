"""Invariants 1, 2, 3 and 7 under random interleavings of everything that can happen to the coordinator."""

import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncrl.config.data import CurriculumConfig, DataConfig
from asyncrl.core.coordinator import Coordinator, LoopSettings, Submission
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.invariants import InvariantError
from asyncrl.core.ledger import GroupState, Ledger, TooManyFailures
from asyncrl.core.records import GroupSummary, LeftOut
from asyncrl.curriculum.filters import constant
from asyncrl.curriculum.samplers import make_sampler
from asyncrl.data.prompts import Prompt
from asyncrl.runfiles.store import LedgerStore

ROWS = 7


class Loop(RuleBasedStateMachine):
    """Workers with engines that lag behind, a trainer, crashes of all of them, and books kept apart.

    The coordinator is restored from its SQLite file by `crash`, which may come after every single event.
    """

    @initialize(
        eta=st.integers(0, 16),
        batch=st.integers(1, 3),
        on_stale=st.sampled_from(["wait", "mask", "drop"]),
        filtering=st.booleans(),
        attempts=st.integers(1, 3),
        steps=st.sampled_from([2, 1000]),
        lag=st.none() | st.integers(0, 3),
        curriculum=st.none() | st.builds(CurriculumConfig, rest_epochs=st.integers(1, 4)),
        tokens=st.none() | st.integers(1, 9),
    )
    def start(self, eta, batch, on_stale, filtering, attempts, steps, lag, curriculum, tokens):
        if lag is not None:
            eta, on_stale, tokens = eta + lag, "wait", None
        filters = (constant,) if filtering else ()
        self.settings = LoopSettings(batch, eta, on_stale, steps, filters, attempts, lag, tokens)
        self.curriculum = curriculum
        self.prompts = [Prompt(i, "say", None, {}) for i in range(ROWS)]
        self.folder = tempfile.TemporaryDirectory()
        self.store = self.open()
        self.coordinator = self.load()
        self.engines = {"a": 0, "b": 0, "c": 0}
        self.leases = {}  # lease id -> (worker, Lease, engine version at the lease)
        self.settled = []  # submissions that were answered, to be repeated
        self.trainer_version = 0
        self.frontier = 0
        self.kept_from = 0  # the oldest checkpoint that the trainer may go back to
        self.batches = {}  # step -> group ids: what the trainer has and has not published
        self.history = {}  # step -> group ids, of every step that was ever taken
        self.delivered = {}  # group id -> payload, as the workers know it
        self.trained = Counter()
        self.admitted_rows = Counter()
        self.returned_rows = 0

    def open(self):
        return LedgerStore(Path(self.folder.name) / "ledger.db", encode=str.encode, decode=bytes.decode)

    def load(self):
        sampler = make_sampler(DataConfig(curriculum=self.curriculum), self.prompts)
        return self.store.load(self.settings, ROWS, seed=3, shuffle=True, sampler=sampler)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    # ---- events ----

    @rule(worker=st.sampled_from("abc"), limit=st.integers(1, 5))
    def lease(self, worker, limit):
        before = self.coordinator.ledger.generated_groups
        places = self.coordinator.open_places(self.engines[worker])
        leased = self.coordinator.lease(worker, self.engines[worker], limit)
        assert len(leased) <= min(limit, places)
        for lease in leased:
            self.leases[lease.lease_id] = (worker, lease, self.engines[worker])
        self.store.save(self.coordinator)
        assert self.coordinator.ledger.generated_groups - before <= limit

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), constant=st.booleans(), left_out=st.integers(0, 3))
    def submit(self, data, constant, left_out):
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        worker, lease, first = self.leases.pop(lease_id)
        versions = data.draw(st.lists(st.integers(first, self.engines[worker]), min_size=1, max_size=4))
        left = LeftOut(left_out, (0.0,) * (left_out // 2))
        summary = GroupSummary(dict(Counter(versions)), (1.0, 1.0 if constant else 0.0), left)
        payload = f"group {lease.group_id} lease {lease_id}"
        outcome = self.coordinator.submit(lease.group_id, lease_id, summary, payload)
        self.store.save(self.coordinator)
        if outcome is Submission.ACCEPTED:
            self.delivered[lease.group_id] = payload
        self.settled.append((lease.group_id, lease_id, summary, payload))

    @precondition(lambda self: self.settled)
    @rule(data=st.data())
    def submit_again(self, data):
        again = data.draw(st.sampled_from(self.settled))
        assert self.coordinator.submit(*again) is Submission.SETTLED

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), tokens=st.integers(0, 5))
    def fail(self, data, tokens):
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        _, lease, _ = self.leases.pop(lease_id)
        self.coordinator.fail(lease.group_id, lease_id, "the reward function broke", sampled_tokens=tokens)
        self.store.save(self.coordinator)

    @rule(worker=st.sampled_from("abc"), really=st.booleans())
    def lose(self, worker, really):
        self.coordinator.worker_lost(worker)
        self.store.save(self.coordinator)
        if really:  # otherwise it was only taken for lost, and its groups still arrive
            self.leases = {k: v for k, v in self.leases.items() if v[0] != worker}
            self.engines[worker] = self.frontier

    @rule(worker=st.sampled_from("abc"))
    def update_engine(self, worker):
        self.engines[worker] = self.frontier

    @precondition(lambda self: len(self.batches) < 2)
    @rule()
    def take(self):
        """The batch of the next step; the one after it may be asked for before its version is out."""
        step = self.trainer_version + len(self.batches)
        if step >= self.settings.total_steps:
            return
        taken = self.coordinator.take(step)
        self.store.save(self.coordinator)
        if taken is None:
            assert step not in self.history, "a batch that was trained before must not be waited for"
            return
        self.assert_size(taken)
        assert taken.step == taken.version == step
        ids = [entry.group_id for entry, _ in taken.groups]
        assert ids == sorted(set(ids))
        for entry, payload in taken.groups:
            assert payload == self.delivered[entry.group_id]
            fresh = [v for v in entry.summary.tokens_by_version if v >= taken.oldest_version]
            assert fresh
            if self.settings.on_stale != "mask":
                assert step - entry.summary.oldest_version <= self.settings.max_staleness
            if self.settings.fixed_lag is not None:
                assert set(entry.summary.tokens_by_version) == {max(0, step - self.settings.fixed_lag)}
        assert self.history.setdefault(step, ids) == ids
        self.batches[step] = ids

    def assert_size(self, taken):
        """As many groups as a batch has, or those that reach the budget of tokens; no more, but for what
        would not fit into the steps that follow."""
        s, entries = self.settings, [entry for entry, _ in taken.groups]
        if s.batch_tokens is None:
            assert len(entries) == s.batch_groups
        elif taken.step not in self.history:
            assert len(entries) == s.batch_groups or sum(e.sampled_tokens for e in entries) >= s.batch_tokens
            deadline = (lambda e: e.admitted_version + s.bound) if s.on_stale == "wait" else lambda e: 0
            *others, last = sorted(entries, key=lambda e: (deadline(e), e.group_id))
            if sum(e.sampled_tokens for e in others) >= s.batch_tokens:
                assert s.on_stale == "wait"
                left = [last, *(e for e in self.coordinator._live.values() if e.step is None)]
                assert any(
                    sum(deadline(e) <= d for e in left) > (d - taken.step) * s.batch_groups
                    for d in range(taken.step, deadline(last) + s.bound + 1)
                )

    @precondition(lambda self: self.batches)
    @rule()
    def take_again(self):
        step = max(self.batches)
        again = self.coordinator.take(step)
        assert [entry.group_id for entry, _ in again.groups] == self.batches[step]

    @precondition(lambda self: self.batches)
    @rule()
    def publish(self):
        batch = self.batches.pop(self.trainer_version)
        self.trainer_version += 1
        self.frontier = max(self.frontier, self.trainer_version)
        self.coordinator.published(self.trainer_version)
        self.store.save(self.coordinator)
        self.trained.update(batch)

    @rule()
    def crash(self):
        """The coordinator is killed and starts from its file; workers and trainer have lived on."""
        self.store.close()
        self.store = self.open()
        before, self.coordinator = self.coordinator, self.load()
        assert self.coordinator.ledger.metrics() == before.ledger.metrics()
        if self.curriculum is not None:
            assert self.coordinator.cursor.sampler.metrics() == before.cursor.sampler.metrics()

    @rule(keep=st.booleans())
    def checkpoint(self, keep):
        if not keep:
            self.kept_from = self.trainer_version
        self.store.forget_trained(self.kept_from)

    @rule(data=st.data(), alone=st.booleans())
    def restart_trainer(self, data, alone):
        """The trainer goes back to a checkpoint; unless it is alone, everybody else starts anew as well."""
        version = data.draw(st.integers(self.kept_from, self.trainer_version))
        if not alone:
            self.crash()
            self.coordinator.all_workers_lost()
            self.leases.clear()
        self.coordinator.rewind(version, self.store.trained_since(version))
        self.store.save(self.coordinator)
        for step in range(version, self.trainer_version):
            self.trained.subtract(self.history[step])
        self.trained += Counter()  # drops the zeros
        self.batches.clear()
        self.trainer_version = version
        self.engines = {w: v if alone else self.frontier for w, v in self.engines.items()}

    # ---- what must hold after every event ----

    @invariant()
    def invariants(self):
        if not hasattr(self, "coordinator"):
            return
        ledger, s = self.coordinator.ledger, self.settings
        ledger.check()
        line = ledger.metrics()
        assert line["ledger/generated_groups"] == (
            line["ledger/trained_groups"]
            + line["ledger/failed_groups"]
            + line["ledger/dropped_groups"]
            + line["ledger/in_flight_groups"]
        )
        assert line["ledger/generated_tokens"] == sum(
            line[f"ledger/{where}_tokens"]
            for where in ("trained", "masked", "dropped", "failed", "in_flight")
        )
        # 2: nothing was admitted beyond the bound.
        bound = (self.coordinator.frontier + s.bound + 1) * s.batch_groups
        assert line["ledger/trained_groups"] + line["ledger/in_flight_groups"] <= bound
        # 7: every group trained once, exactly those that the trainer published.
        assert line["ledger/trained_groups"] == len(self.trained) <= self.coordinator.version * s.batch_groups
        assert len(self.trained) == self.coordinator.version * s.batch_groups or s.batch_tokens is not None
        assert all(n == 1 for n in self.trained.values())

    @invariant()
    def no_prompt_is_skipped(self):
        if not hasattr(self, "coordinator"):
            return
        cursor = self.coordinator.cursor
        returned = self.coordinator.ledger.dropped_groups["stale"]
        handed_out = sum(cursor.positions) - cursor.passed_over + returned - len(cursor.returned)
        assert self.coordinator.ledger.generated_groups == handed_out

    @invariant()
    def counts_tell_what_a_look_at_all_groups_tells(self):
        """Whether the next step must wait, how far its batch reaches, and who has leased what."""
        if not hasattr(self, "coordinator"):
            return
        coordinator, step = self.coordinator, self.coordinator.steps_taken
        must_wait, batch = coordinator._must_wait(step), coordinator._choose(step).batch
        assert not (must_wait and batch)
        assert must_wait or batch or self.settings.fixed_lag is not None
        assert must_wait or coordinator._choose(step, coordinator._last_needed()).batch == batch
        leased = [e for e in coordinator._live.values() if e.state is GroupState.LEASED]
        for worker in "abc":
            ours = [e.lease_id for e in leased if e.worker == worker]
            assert [lease.lease_id for lease in coordinator.leases_of(worker)] == ours


Loop.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLoop = Loop.TestCase


class Simulation:
    """Drives a coordinator to the end of a run with workers of random speed, and records what was trained."""

    def __init__(self, settings: LoopSettings, seed: int, workers: int = 4) -> None:
        self.rng = random.Random(seed)
        self.settings = settings
        self.coordinator = Coordinator(settings, PromptCursor(50, seed))
        self.engines = [0] * workers
        self.running = []
        self.oldest_trained = 0
        self.trained_versions = []  # of each step's tokens
        self.events = 0

    def run(self, constant_share=0.0, straggler_share=0.0, fail_share=0.0):
        step, taken = 0, None
        while not self.coordinator.finished:
            self.events += 1
            assert self.events < 200_000, f"no progress: waiting for {self.coordinator.waits_for()}"
            worker = self.rng.randrange(len(self.engines))
            if self.rng.random() < 0.5:
                self.engines[worker] = self.coordinator.version
            for lease in self.coordinator.lease(str(worker), self.engines[worker], self.rng.randint(1, 4)):
                slow = self.rng.random() < straggler_share
                self.running.append((lease, worker, self.engines[worker], 400 if slow else 5))
            self.advance(constant_share, fail_share)
            if taken is None:
                taken = self.coordinator.take(step)
            elif self.rng.random() < 0.2:
                self.trained_versions.append(
                    {v for e, _ in taken.groups for v in e.summary.tokens_by_version}
                )
                for entry, _ in taken.groups:
                    fresh = [v for v in entry.summary.tokens_by_version if v >= taken.oldest_version]
                    self.oldest_trained = max(self.oldest_trained, step - min(fresh))
                step += 1
                self.coordinator.published(step)
                taken = None

    def advance(self, constant_share, fail_share):
        still = []
        for lease, worker, first, left in self.running:
            if left > 0 and self.rng.random() < 0.9:
                still.append((lease, worker, first, left - 1))
            elif self.rng.random() < fail_share:
                self.coordinator.fail(lease.group_id, lease.lease_id, "broken", sampled_tokens=3)
            else:
                tokens = {first: 2, self.engines[worker]: 1}
                rewards = (1.0, 1.0) if self.rng.random() < constant_share else (0.0, 1.0)
                self.coordinator.submit(lease.group_id, lease.lease_id, GroupSummary(tokens, rewards), None)
        self.running = still


@pytest.mark.parametrize("on_stale", ["wait", "mask", "drop"])
def test_dynamic_filtering_does_not_inflate_the_bound(on_stale):
    """The peers' failing case: B=8, half of the groups filtered, eta=1, 60 steps. They reached age 32."""
    loop = Simulation(LoopSettings(8, 1, on_stale, 60, filters=(constant,)), seed=1)
    loop.run(constant_share=0.5)
    ledger = loop.coordinator.ledger
    assert loop.oldest_trained == 1
    assert ledger.groups[GroupState.TRAINED] == 480
    assert ledger.dropped_groups["constant"] > 300


@pytest.mark.parametrize("on_stale", ["wait", "mask", "drop"])
@pytest.mark.parametrize("eta", [0, 1, 4])
def test_stragglers_and_failures_neither_break_the_bound_nor_stop_the_loop(on_stale, eta):
    loop = Simulation(LoopSettings(4, eta, on_stale, 40), seed=2)
    loop.run(straggler_share=0.05, fail_share=0.1)
    assert loop.oldest_trained <= eta
    assert loop.coordinator.ledger.groups[GroupState.TRAINED] == 160


@pytest.mark.parametrize("on_stale", ["wait", "mask", "drop"])
@pytest.mark.parametrize("eta", [0, 1, 4])
def test_a_budget_of_tokens_for_a_batch_neither_breaks_the_bound_nor_stops_the_loop(on_stale, eta):
    """Admission knows of it, too: otherwise more would come than batches may take."""
    loop = Simulation(LoopSettings(8, eta, on_stale, 60, (constant,), batch_tokens=6), seed=6)
    loop.run(constant_share=0.3, straggler_share=0.05, fail_share=0.1)
    ledger = loop.coordinator.ledger
    assert loop.oldest_trained <= eta
    assert ledger.tokens[GroupState.TRAINED] / 60 == pytest.approx(7, abs=1.5)
    assert ledger.groups[GroupState.TRAINED] < 60 * 7


def test_waiting_never_drops_a_group():
    loop = Simulation(LoopSettings(4, 2, "wait", 40), seed=3)
    loop.run(straggler_share=0.2)
    assert loop.coordinator.ledger.groups[GroupState.DROPPED] == 0


@pytest.mark.parametrize("lag", [0, 1, 3, 9])
def test_under_a_fixed_lag_every_token_of_every_batch_has_that_age(lag):
    settings = LoopSettings(4, 9, "wait", 30, filters=(constant,), fixed_lag=lag)
    loop = Simulation(settings, seed=5)
    loop.run(constant_share=0.3, straggler_share=0.05, fail_share=0.1)
    assert loop.trained_versions == [{max(0, step - lag)} for step in range(30)]
    assert loop.coordinator.ledger.groups[GroupState.TRAINED] == 120
    assert loop.coordinator.ledger.in_flight == 0
    assert loop.coordinator.waits_for() == []


def test_under_a_fixed_lag_a_step_waits_for_all_that_its_version_samples():
    coordinator = Coordinator(LoopSettings(1, 2, "wait", 10, fixed_lag=1), PromptCursor(5, 0))
    first, second = coordinator.lease("w", 0, 9)
    coordinator.submit(first.group_id, first.lease_id, GroupSummary({0: 1}, (1.0,)), None)
    assert coordinator.take(0) is None
    assert [entry.group_id for entry in coordinator.waits_for()] == [second.group_id]
    coordinator.submit(second.group_id, second.lease_id, GroupSummary({0: 1}, (1.0,)), None)
    assert coordinator.take(0) is not None
    assert coordinator.take(1) is None, "version 1, which has its share to sample, is not out"
    coordinator.published(1)
    assert coordinator.take(1) is None
    (third,) = coordinator.lease("w", 1, 9)
    coordinator.submit(third.group_id, third.lease_id, GroupSummary({1: 1}, (1.0,)), None)
    ((entry, _),) = coordinator.take(1).groups
    assert entry.group_id == second.group_id


def test_no_group_is_admitted_that_the_run_will_not_train():
    loop = Simulation(LoopSettings(4, 8, "wait", 10), seed=4)
    loop.run()
    assert loop.coordinator.ledger.generated_groups == 40


def after_one_step(worker):
    """A synchronous coordinator that has published version 1."""
    coordinator = Coordinator(LoopSettings(2, 0, "wait", 10), PromptCursor(5, 0))
    for lease in coordinator.lease(worker, 0, 2):
        coordinator.submit(lease.group_id, lease.lease_id, GroupSummary({0: 1}, (1.0,)), None)
    assert coordinator.take(0) is not None
    coordinator.published(1)
    return coordinator


def test_a_lagging_engine_is_bound_by_its_own_version():
    coordinator = after_one_step("w")
    assert coordinator.lease("w", 0, 2) == []
    assert len(coordinator.lease("w", 1, 9)) == 2


def test_a_token_older_than_its_lease_is_refused():
    coordinator = Coordinator(LoopSettings(1, 1, "wait", 10), PromptCursor(5, 0))
    first, _ = coordinator.lease("w", 0, 2)
    coordinator.submit(first.group_id, first.lease_id, GroupSummary({0: 1}, (1.0,)), None)
    coordinator.take(0)
    coordinator.published(1)
    coordinator.worker_lost("w")
    (again,) = coordinator.lease("w", 1, 1)
    with pytest.raises(InvariantError, match=r"invariant 6 \(versions are true\)"):
        coordinator.submit(again.group_id, again.lease_id, GroupSummary({0: 1}, (1.0,)), None)


def test_what_the_trainer_waits_for_is_named():
    coordinator = Coordinator(LoopSettings(2, 0, "wait", 10), PromptCursor(5, 0))
    first, second = coordinator.lease("rollout-0", 0, 2)
    coordinator.submit(first.group_id, first.lease_id, GroupSummary({0: 1}, (1.0,)), None)
    (waits_for,) = coordinator.waits_for()
    assert (waits_for.group_id, waits_for.worker) == (second.group_id, "rollout-0")


def test_a_group_that_always_fails_ends_as_failed_and_not_as_reward_zero():
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10, max_attempts=2), PromptCursor(5, 0))
    (lease,) = coordinator.lease("w", 0, 1)
    assert coordinator.fail(lease.group_id, lease.lease_id, "boom")
    (again,) = coordinator.lease("w", 0, 1)
    assert (again.group_id, again.attempt) == (lease.group_id, 1)
    assert not coordinator.fail(again.group_id, again.lease_id, "boom")
    assert coordinator.ledger.failed_groups == {"boom": 1}


def test_lost_workers_cost_a_group_no_attempt():
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10, max_attempts=1), PromptCursor(5, 0))
    for i in range(5):
        (lease,) = coordinator.lease(f"w{i}", 0, 1)
        assert (lease.group_id, lease.attempt) == (0, 0)
        assert coordinator.worker_lost(f"w{i}") == [0]
    assert coordinator.ledger.failed_groups.total() == 0
    assert coordinator.ledger.returned_leases == 5


def test_what_newer_weights_were_to_sample_is_no_place_for_older_ones():
    coordinator = after_one_step("new")
    assert len(coordinator.lease("new", 1, 2)) == 2
    coordinator.worker_lost("new")
    assert [coordinator.open_places(version) for version in (0, 1, 2)] == [0, 2, 2]
    assert coordinator.lease("old", 0, 2) == []


def test_counts_below_zero_are_noticed_though_their_sum_is_right():
    ledger = Ledger(tokens=Counter({GroupState.READY: 5, GroupState.TAKEN: -5}))
    with pytest.raises(InvariantError, match="out of range"):
        ledger.check()


def test_too_many_failures_end_the_run_with_their_reasons():
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10, max_attempts=1), PromptCursor(5, 0))
    for _ in range(19):
        (lease,) = coordinator.lease("w", 0, 1)
        coordinator.fail(lease.group_id, lease.lease_id, "ValueError", f"ValueError: boom {lease.group_id}")
        coordinator.ledger.judge_failures(0.5)
    (lease,) = coordinator.lease("w", 0, 1)
    coordinator.fail(lease.group_id, lease.lease_id, "TimeoutError")
    coordinator.ledger.judge_failures(1.0)
    with pytest.raises(TooManyFailures, match=r"20 of 20.*0.5:\n  19 x ValueError\n(?s:.*)boom 18"):
        coordinator.ledger.judge_failures(0.5)


def test_a_budget_below_a_groups_tokens_admits_a_group_for_every_step_that_may_train_on_it():
    coordinator = Coordinator(LoopSettings(4, 2, "wait", 10, batch_tokens=3), PromptCursor(5, 0))
    (lease,) = coordinator.lease("w", 0, 1)
    coordinator.submit(lease.group_id, lease.lease_id, GroupSummary({0: 30}, (1.0,)), "")
    coordinator.take(0)
    coordinator.published(1)
    assert len(coordinator.lease("w", 1, 12)) == 3


def trained(coordinator: Coordinator, steps: int) -> dict:
    """Train `steps` steps of one group each; the groups with their payloads, as a store keeps them."""
    groups = {}
    for step in range(steps):
        (lease,) = coordinator.lease("w", step, 1)
        payload = f"group {lease.group_id}"
        coordinator.submit(lease.group_id, lease.lease_id, GroupSummary({step: 1}, (1.0,)), payload)
        ((entry, _),) = coordinator.take(step).groups
        coordinator.published(step + 1)
        groups[lease.group_id] = (entry, payload)
    return groups


def test_a_trainer_that_goes_back_gets_the_same_batches_again_and_then_new_ones():
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10), PromptCursor(5, 0))
    groups = trained(coordinator, 4)
    coordinator.rewind(2, {g: group for g, group in groups.items() if group[0].step >= 2})
    assert (coordinator.version, coordinator.frontier) == (2, 4)
    assert coordinator.ledger.groups[GroupState.TRAINED] == 2
    (new,) = coordinator.lease("w", 4, 9)  # what is trained again keeps its places
    coordinator.submit(new.group_id, new.lease_id, GroupSummary({4: 1}, (1.0,)), "new")
    for step in (2, 3):
        ((entry, payload),) = coordinator.take(step).groups
        assert (entry.group_id, payload) == (step, f"group {step}")
        coordinator.published(step + 1)
    ((entry, payload),) = coordinator.take(4).groups
    assert payload == "new"


def test_a_trainer_cannot_go_back_to_where_the_ledger_has_nothing():
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10), PromptCursor(5, 0))
    groups = trained(coordinator, 3)
    with pytest.raises(ValueError, match="has version 7, and the ledger ends at 3"):
        coordinator.rewind(7, {})
    del groups[1]
    with pytest.raises(ValueError, match=r"by step: \{0: 1, 2: 1\}"):
        coordinator.rewind(0, groups)
    assert coordinator.version == 3
    coordinator.ledger.check()
