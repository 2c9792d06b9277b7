"""A run on a virtual clock: the parts that compute take the time that the time model predicts, and everything
that judges them is real: the coordinator's books, the watch for stalls, the supervisor's deadlines, the
budget."""

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from asyncrl.cluster.kinds import set_of
from asyncrl.cluster.supervisor import why_lost
from asyncrl.core.coordinator import Coordinator, Submission
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.ledger import GroupState
from asyncrl.core.records import GroupSummary
from asyncrl.liveness.pulse import Pulse, Stillness
from asyncrl.liveness.stall import StallWatch
from asyncrl.roles import COORDINATOR, RANK_0
from asyncrl.runfiles.budget import Budget, Usage
from asyncrl.runfiles.state import loop_settings
from asyncrl.work import Work

TICK_S = 2.0
COORDINATOR_UP_S = 5.0
CONSTANT_SHARE = 0.4
"""Of the groups that are dropped where those without a signal are."""


class Declared(Exception):  # noqa: N818 - says what happened
    """A healthy run was taken for something else."""


@dataclass
class Engine:
    """Decodes as many responses as its slots hold, on a clock that stands still while another computes."""

    engine_version: int | None = None
    last_heard_s: float = 0.0
    generated_s: float = 0.0
    clock_s: float = 0.0
    running: list = field(default_factory=list)
    """(end on the engine's clock, lease id), a heap."""
    leases: dict = field(default_factory=dict)
    """By id: the lease, its version, responses left, tokens."""


class VirtualRun:
    """lengths: gives a response's tokens. shows_progress: whether the watch learns of what moves inside a
    step."""

    def __init__(self, config, placement, pace, lengths, *, shows_progress=True):
        self.config, self.placement, self.pace, self.lengths = config, placement, pace, lengths
        self.shows_progress = shows_progress
        self.now_s = 0.0
        rows = 4 * config.trainer.batch_groups
        self.coordinator = Coordinator(loop_settings(config), PromptCursor(rows, 0))
        self.engines = {place.role: Engine() for place in placement.of("rollout")}
        self.roles = [COORDINATOR, *(place.role for place in placement.places)]
        self.pulses, self.stillness = {}, {role: Stillness() for role in self.roles}
        self.watch = StallWatch(
            config.run, self.coordinator, self.engines, self.roles, lambda: self.pulses, lambda: self.now_s
        )
        self.usage = Usage(placement.gpus, 0.0)
        self.budget = Budget(self.usage, config.run.gpu_hours, config.run.steps, lambda: self.now_s)
        self.step_s, self.applied_waits_s, self.order_waits_s = [], [0.0], []
        self.published = self.work = None
        self.computes = Counter()
        self.scores = {role: deque() for role in pace.score_s}
        """Of each reward model: [seconds left, lease, engine] of what it has to score."""
        self.random = np.random.default_rng(0)

    def run(self, steps):
        """To the end of so many steps. Raises `Declared`, and `RunFailed` as the watch does."""
        for _ in self._train(steps):
            self._tick()

    # ---- the trainer, as a course of events: each `yield` lets a tick pass ----

    def _train(self, steps):
        yield from self._wait(lambda: self._is_up(RANK_0))
        yield from self._publish(0)
        began_s = self.now_s
        for step in range(steps):
            asked_s = self.now_s
            yield from self._wait(lambda step=step: self._take(step))
            self.order_waits_s.append(self.now_s - asked_s)
            yield from self._compute(step)
            yield from self._publish(step + 1)
            every = self.config.checkpoint.every_steps
            if every and (step + 1) % every == 0:
                yield from self._pass(self.pace.snapshot_s)
            self.step_s.append(self.now_s - began_s)
            self.budget.stepped(self.now_s - began_s)
            began_s = self.now_s
            if self.budget.is_spent:
                raise Declared(f"the budget was spent after {step + 1} steps")

    def _compute(self, step):
        left_s = self.pace.train_s
        micros = int(self.pace.train_s / self.pace.micro_batch_s)
        while left_s > 0:
            self.computes["trainer"] = 1
            self._take(step + 1)  # the next batch arrives meanwhile
            yield
            left_s -= TICK_S * self._speed("trainer")
            done = int((self.pace.train_s - left_s) / self.pace.micro_batch_s)
            if self.work is None or done != self.work.done:
                self.work = Work("micro-batches", done, micros, self.now_s)
        self.computes["trainer"] = 0
        self.work = None

    def _publish(self, version):
        asked_s = self.now_s
        yield from self._wait(lambda: self._all_have(version - 2))
        self.applied_waits_s.append(self.now_s - asked_s)
        yield from self._pass(self.pace.publish_s)
        if version:
            self.coordinator.published(version)
            self.watch.stepped()
        self.watch.has_weights = True
        self.published = version, self.now_s

    def _take(self, step):
        if self.coordinator.steps_taken > step:
            return True
        if step >= self.config.run.steps:
            return False
        ready = self.coordinator.ledger.groups[GroupState.READY]
        if ready < self.config.trainer.batch_groups or self.coordinator.take(step) is None:
            return False
        self.watch.taken()
        return True

    def _all_have(self, version):
        has = [e.engine_version for e in self.engines.values() if e.engine_version is not None]
        return all(v >= version for v in has)

    def _wait(self, condition):
        while not condition():
            yield

    def _pass(self, seconds):
        until_s = self.now_s + seconds
        yield from self._wait(lambda: self.now_s >= until_s)

    # ---- everything else, tick by tick ----

    def _tick(self):
        self.now_s += TICK_S
        self._beat()
        for name, engine in self.engines.items():
            if self._is_up(name):
                self._decode(name, engine)
        for role, queue in self.scores.items():
            self._score(role, queue)
        self._judge()

    def _beat(self):
        for role in self.roles:
            if self._is_up(role):
                work = self.work if role == RANK_0 and self.shows_progress else None
                self.pulses[role] = Pulse(1, 0, [], work=work, at_s=self.now_s)

    def _is_up(self, role):
        """All that happens between a start and the first weights is taken for a role's own start."""
        return self.now_s >= (COORDINATOR_UP_S if role == COORDINATOR else self.pace.start_s)

    def _decode(self, name, engine):
        engine.last_heard_s = self.now_s
        version, since_s = self.published or (None, 0.0)
        if version != engine.engine_version and self.now_s >= since_s + self.pace.load_s:
            engine.engine_version = version
            self.watch.started()
        if engine.running:
            engine.clock_s += TICK_S * self._speed("rollout")
            if self.shows_progress:
                engine.generated_s = self.now_s
        while engine.running and engine.running[0][0] <= engine.clock_s:
            held = engine.leases[heapq.heappop(engine.running)[1]]
            held[2] -= 1
            if held[2] == 0:
                self._sampled(engine, held)
        if engine.engine_version is not None:
            self._lease(name, engine)
        self.computes[name] = bool(engine.running)

    def _lease(self, name, engine):
        size = self.config.rollout.group_size
        room = (self.pace.decoding - len(engine.running)) // size
        leases = self.coordinator.lease(name, engine.engine_version, room) if room > 0 else []
        self.watch.leased(lease.group_id for lease in leases)
        for lease in leases:
            lengths = [self.lengths(self.random) for _ in range(size)]
            engine.leases[lease.lease_id] = [lease, engine.engine_version, size, sum(lengths)]
            for tokens in lengths:
                end_s = engine.clock_s + tokens * self.pace.decode_step_s
                heapq.heappush(engine.running, (end_s, lease.lease_id))

    def _sampled(self, engine, held):
        """A group is sampled: reward models score it, one after the other here."""
        for role, queue in self.scores.items():
            share = self.config.trainer.batch_groups
            queue.append([self.pace.score_s[role] / share, engine, held])
            return
        self._submit(engine, held)

    def _score(self, role, queue):
        self.computes[role] = min(1.0, sum(cost_s for cost_s, *_ in queue) / TICK_S)
        left_s = TICK_S * self._speed(role)
        while queue and queue[0][0] <= left_s:
            cost_s, engine, held = queue.popleft()
            left_s -= cost_s
            self._submit(engine, held)
        if queue:
            queue[0][0] -= left_s

    def _submit(self, engine, held):
        lease, version, _, tokens = held
        constant = self.config.objective.filter_constant_groups and self.random.random() < CONSTANT_SHARE
        summary = GroupSummary({version: tokens}, (0.0, 0.0) if constant else (0.0, 1.0))
        became = self.coordinator.submit(lease.group_id, lease.lease_id, summary, b"")
        if self.shows_progress:
            self.watch.delivered(lease.group_id, summary, kept=became is Submission.ACCEPTED)
        del engine.leases[lease.lease_id]

    def _speed(self, kind):
        """What computes beside it on its GPUs takes its share of their time."""
        speeds = []
        for place in self.placement.places:
            if place.kind == kind:
                beside = {p.role: p for gpu in place.gpus for p in self.placement.on(gpu) if p.kind != kind}
                speeds.append(1 / (1 + sum(map(self._computes, beside.values()))))
        return sum(speeds) / len(speeds)

    def _computes(self, place):
        return self.computes["trainer" if set_of(place.role) == "trainer" else place.role]

    def _judge(self):
        for role in self.roles:
            pulse = self.pulses.get(role)
            still_s = None if pulse is None else self.stillness[role].look(pulse, self.now_s)
            if why := why_lost(role, self.now_s, still_s, self.config.run):
                raise Declared(f"{role} {why}")
        if stall := self.watch.look():
            raise Declared(stall.text)
