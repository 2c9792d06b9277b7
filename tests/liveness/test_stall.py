"""Who holds up a run, by the coordinator's books and the roles' pulses."""

import time
from dataclasses import dataclass

import pytest

from asyncrl.config import from_tree
from asyncrl.core.coordinator import Coordinator, LoopSettings, Submission
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.records import GroupSummary
from asyncrl.curriculum.filters import constant
from asyncrl.errors import RunFailed
from asyncrl.liveness.pulse import Pulse
from asyncrl.liveness.stall import StallWatch
from asyncrl.waits import Wait
from asyncrl.work import Work

KEPT = GroupSummary({0: 5}, (1.0, 0.0))
ROLES = ("coordinator", "trainer-0", "rollout-0", "rollout-1")


@dataclass
class Worker:
    engine_version: int | None = 0
    last_heard_s: float = 0.0
    generated_s: float = 0.0


class Run:
    """A run of two groups a step with two workers, which has begun. `stall_s` is 10, `start_s` 100."""

    def __init__(self):
        self.now_s = 1000.0
        self.pulses = {}
        for role in ROLES:
            self.up(role)
        self.coordinator = Coordinator(
            LoopSettings(2, 1, "wait", 10, filters=(constant,)), PromptCursor(8, 0, shuffle=False)
        )
        self.workers = {"rollout-0": Worker(), "rollout-1": Worker()}
        tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
        config = from_tree(tree, overrides=["run.stall_s=10", "run.start_s=100"])
        self.watch = StallWatch(
            config.run, self.coordinator, self.workers, ROLES, lambda: self.pulses, lambda: self.now_s
        )

    def up(self, role, *waits, work=None, unhurried=None):
        waits = [Wait(what, 0.0) for what in waits]
        self.pulses[role] = Pulse(1, 0, waits, work=work, unhurried=unhurried)

    def works(self, role, done, total=None, what="micro-batches"):
        self.up(role, work=Work(what, done, total, 0.0))

    def train(self):
        """The trainer has the batch of step 0."""
        self.begin()
        self.submit(self.lease("rollout-0", 2))
        self.coordinator.take(0)
        self.watch.taken()

    def begin(self):
        self.watch.has_weights = True
        self.watch.started()

    def lease(self, worker, n=1):
        leases = self.coordinator.lease(worker, 0, n)
        self.watch.leased(lease.group_id for lease in leases)
        return leases

    def submit(self, leases):
        for lease in leases:
            self.coordinator.submit(lease.group_id, lease.lease_id, KEPT, b"")

    def drop(self, worker, rewards=(0.0, 0.0)):
        """A group that its rewards do not let in comes from a worker."""
        (lease,) = self.lease(worker)
        self.workers[worker].generated_s = self.now_s
        summary = GroupSummary({0: 5}, rewards)
        assert self.coordinator.submit(lease.group_id, lease.lease_id, summary, b"") is Submission.DROPPED
        self.watch.delivered(lease.group_id, summary, kept=False)

    def pass_by(self, seconds):
        self.now_s += seconds
        for worker in self.workers.values():
            worker.last_heard_s = self.now_s


@pytest.fixture
def run():
    return Run()


def test_a_run_that_does_not_start_ends_with_an_explanation(run):
    run.pass_by(100)
    assert run.watch.look() is None
    run.pass_by(1)
    with pytest.raises(RunFailed, match=r"has not started after run.start_s=100. The trainer has not pub"):
        run.watch.look()


def test_the_worker_with_the_oldest_lease_that_a_step_waits_for_holds_it_up(run):
    run.begin()
    run.lease("rollout-0")
    run.pass_by(2)
    run.lease("rollout-1")
    run.pass_by(8)
    assert run.watch.look() is None
    run.up("rollout-0", "the rewards of group 0")
    run.pass_by(1)
    stall = run.watch.look()
    assert stall.culprits == ("rollout-0",)
    assert stall.version == 0
    for part in (
        "no training step has ended for 11 s (run.stall_s=10)",
        "The trainer has waited for the batch of step 0 for 11 s",
        "Group 0 is leased to rollout-0 for 11 s",
        "Group 1 is leased to rollout-1 for 9 s",
        "rollout-0 waits for the rewards of group 0 (for ",
    ):
        assert part in stall.text


def test_the_next_stall_comes_after_as_long_a_time_again(run):
    run.begin()
    run.lease("rollout-0", 2)
    run.pass_by(11)
    assert run.watch.look() is not None
    run.pass_by(10)
    assert run.watch.look() is None
    run.watch.joined()  # its successor
    run.pass_by(10)
    assert run.watch.look() is None
    run.pass_by(1)
    assert "has ended for 32 s" in run.watch.look().text


def test_the_trainer_holds_it_up_while_it_has_a_batch(run):
    run.train()
    run.pass_by(11)
    stall = run.watch.look()
    assert stall.culprits == ("trainer-0",)
    assert "The trainer has had the batch of step 0 for 11 s" in stall.text


def test_whoever_the_trainer_waits_for_before_it_can_publish_holds_it_up(run):
    run.begin()
    run.submit(run.lease("rollout-0", 2))
    run.coordinator.take(0)
    run.watch.behind = ("rollout-1",)
    run.pass_by(11)
    assert run.watch.look().culprits == ("rollout-1",)


def test_a_worker_that_is_silent_holds_up_a_step_for_which_nothing_is_leased(run):
    run.begin()
    run.pass_by(11)
    run.workers["rollout-1"].last_heard_s = run.now_s - 6
    assert run.watch.look().culprits == ("rollout-1",)


def test_nobody_is_blamed_where_all_seem_well(run):
    """Nor a guest that has said hello and still loads its engine."""
    run.begin()
    run.workers["rollout-2"] = Worker(engine_version=None)
    run.pass_by(11)
    run.workers["rollout-2"].last_heard_s = run.now_s - 11
    assert run.watch.look().culprits == ()


def test_a_role_that_is_being_started_gets_its_time(run):
    run.begin()
    run.lease("rollout-0", 2)
    del run.pulses["trainer-0"]
    run.pass_by(100)
    assert run.watch.look() is None
    run.up("trainer-0")
    run.pass_by(10)
    assert run.watch.look() is None
    run.pass_by(1)
    assert run.watch.look() is not None


def test_an_engine_that_starts_in_the_trainers_turn_is_not_waited_for(run):
    """However long the step takes, and the trainer stays the one that holds it up."""
    run.train()
    del run.pulses["rollout-1"]
    run.watch.sleeps = lambda role: role == "rollout-1"
    for done in range(6):
        run.works("trainer-0", done)
        run.pass_by(9.5)
        assert run.watch.look() is None
    run.watch.sleeps = lambda role: False
    run.pass_by(100)  # for its start
    assert run.watch.look() is None
    run.watch.sleeps = lambda role: role == "rollout-1"
    run.watch.stepped()
    run.pass_by(11)
    assert run.watch.look().culprits == ("trainer-0",)


def test_an_engine_that_keeps_its_memory_from_a_trainer_that_starts_is_replaced(run):
    run.begin()
    del run.pulses["trainer-0"]
    run.watch.behind = ("rollout-0",)
    run.pass_by(101)
    stall = run.watch.look()
    assert stall.culprits == ("rollout-0",)
    assert "The trainer waits for rollout-0. trainer-0 has not come up yet." in stall.text


def test_a_role_that_does_not_come_back_is_a_stall_at_last(run):
    run.begin()
    del run.pulses["trainer-0"]
    run.lease("rollout-0", 2)
    run.pass_by(101)
    stall = run.watch.look()
    assert stall.culprits == ()
    assert "trainer-0 has not come up yet." in stall.text


def test_a_step_whose_micro_batches_go_on_is_not_stalled(run):
    run.train()
    for done in range(5):
        run.works("trainer-0", done, 120)
        run.pass_by(9)
        assert run.watch.look() is None
    run.pass_by(11)  # and now it stands still
    stall = run.watch.look()
    assert stall.culprits == ("trainer-0",)
    assert "no training step has ended for 56 s (run.stall_s=10)" in stall.text
    assert "trainer-0 waits for nothing, has done 4 of 120 micro-batches (the last " in stall.text


def test_a_step_for_which_tokens_are_generated_is_not_stalled(run):
    run.begin()
    run.lease("rollout-0", 2)
    for _ in range(5):
        run.pass_by(9)
        run.workers["rollout-0"].generated_s = run.now_s
        assert run.watch.look() is None
    run.pass_by(11)
    stall = run.watch.look()
    assert stall.culprits == ("rollout-0",)
    assert "rollout-0 has version 0, last reported 0 s ago and sampled its last token 11 s ago." in stall.text


def test_groups_that_are_handed_in_and_scores_count_while_a_step_waits_for_them(run):
    run.begin()
    leases = run.lease("rollout-0", 2)
    run.pass_by(9)
    run.watch.delivered(leases[0].group_id, KEPT, kept=True)
    run.pass_by(9)
    run.works("reward-0", 1)
    assert run.watch.look() is None
    run.pass_by(9)
    assert run.watch.look() is None
    run.pass_by(2)
    assert run.watch.look() is not None


@pytest.mark.parametrize("role", ["trainer-1", "reward-0", "rollout-0"])
def test_what_the_step_does_not_need_now_is_no_progress(run, role):
    run.train()
    (lease,) = run.lease("rollout-1")  # of the next batch
    for done in range(3):
        run.works(role, done)
        run.workers["rollout-1"].generated_s = run.now_s
        run.pass_by(5)
        stall = run.watch.look()
    run.watch.delivered(lease.group_id, KEPT, kept=True)
    assert (stall or run.watch.look()).culprits == ("trainer-0",)


def test_a_trainer_that_waits_for_its_batch_and_engines_that_it_does_not_wait_for_are_no_progress(run):
    run.begin()
    run.lease("rollout-0", 2)
    run.works("trainer-0", 1)
    run.watch.look()
    run.pass_by(6)
    run.works("trainer-0", 2)
    run.workers["rollout-1"].generated_s = run.now_s
    assert run.watch.look() is None
    run.pass_by(5)
    assert run.watch.look().culprits == ("rollout-0",)


def test_what_moves_without_end_is_a_stall_at_last(run):
    """A group fails again and again, however many tokens are sampled for it."""
    run.begin()
    for _ in range(20):
        run.lease("rollout-0", 1)
        run.workers["rollout-0"].generated_s = run.now_s
        run.pass_by(3)
        assert run.watch.look() is None
    run.pass_by(1)
    stall = run.watch.look()
    assert (
        "no training step has ended for 61 s (there is progress, but for more than 6 times run.stall_s=10)"
        in (stall.text)
    )
    assert stall.culprits == ("rollout-0",)


def test_attempts_that_fail_are_no_progress(run):
    run.begin()
    (lease,) = run.lease("rollout-0")
    run.pass_by(6)
    run.watch.failed(lease.group_id)
    run.pass_by(5)
    assert run.watch.look() is not None


def test_a_trainer_that_writes_or_reads_a_checkpoint_takes_its_time(run):
    run.train()
    run.up(
        "trainer-0", "the checkpoint of step 0 to be written", unhurried="writing the checkpoint of step 0"
    )
    for _ in range(5):
        run.pass_by(9)
        assert run.watch.look() is None
    run.up("trainer-0")
    run.pass_by(11)
    assert run.watch.look().culprits == ("trainer-0",)


def test_a_new_trainer_may_read_its_checkpoint_before_it_has_weights(run):
    run.begin()
    run.watch.has_weights = False
    run.up("trainer-0", unhurried="reading the newest checkpoint")
    run.pass_by(55)
    run.watch.look()
    run.pass_by(4)
    assert run.watch.look() is None
    run.pass_by(2)
    assert "there is progress, but for more than 6 times" in run.watch.look().text


def test_what_a_trainer_writes_excuses_no_worker(run):
    run.begin()
    run.lease("rollout-0", 2)
    run.up("trainer-0", unhurried="writing the checkpoint of step 0")
    run.pass_by(11)
    assert run.watch.look().culprits == ("rollout-0",)


def test_a_role_that_is_started_again_in_a_long_step_gets_its_time(run):
    run.begin()
    run.lease("rollout-0", 2)
    for _ in range(5):
        run.pass_by(8)
        run.workers["rollout-0"].generated_s = run.now_s
        assert run.watch.look() is None
    run.pulses.pop("rollout-1")
    run.watch._run = run.watch._run.model_copy(update={"start_s": 20.0})
    run.pass_by(1)
    assert run.watch.look() is None
    run.pass_by(19)
    assert run.watch.look() is None
    run.pass_by(2)
    assert run.watch.look() is not None


@pytest.fixture
def ended(run):
    """A run whose one step is done."""
    run.coordinator = Coordinator(LoopSettings(2, 1, "wait", 1), PromptCursor(8, 0, shuffle=False))
    run.watch._coordinator = run.coordinator
    run.train()
    run.coordinator.published(1)
    run.watch.stepped()
    return run


def test_a_run_that_does_not_end_after_its_last_step_says_what_its_trainer_waits_for(ended):
    ended.pass_by(10)
    assert ended.watch.look() is None
    ended.up("trainer-0", "the end of the other ranks")
    ended.pass_by(1)
    stall = ended.watch.look()
    assert (stall.culprits, stall.version) == (("trainer-0",), 1)
    for part in (
        "the run has not ended for 11 s after its last step (run.stall_s=10)",
        "The trainer has done all 1 steps but has not ended.",
        "trainer-0 waits for the end of the other ranks (for ",
    ):
        assert part in stall.text
    ended.pass_by(11)
    assert ended.watch.look().version == stall.version  # which ends it


def test_the_last_checkpoint_has_its_time_but_not_for_ever(ended):
    ended.up("trainer-0", unhurried="writing the checkpoint of step 1")
    for _ in range(6):
        ended.workers["rollout-0"].generated_s = ended.now_s
        ended.pass_by(10)
        assert ended.watch.look() is None
    ended.pass_by(1)
    stall = ended.watch.look()
    assert stall.culprits == ("trainer-0",)
    assert "after its last step (there is progress, but for more than 6 times run.stall_s=10)" in stall.text
    assert "is writing the checkpoint of step 1" in stall.text


def test_what_others_do_is_no_end_of_the_run(ended):
    for done in range(3):
        ended.works("reward-0", done)
        ended.workers["rollout-0"].generated_s = ended.now_s
        ended.pass_by(5)
        stall = ended.watch.look()
    assert stall.culprits == ("trainer-0",)


def test_a_trainer_that_is_started_again_for_the_end_gets_its_time(ended):
    del ended.pulses["trainer-0"]
    ended.pass_by(100)
    assert ended.watch.look() is None
    ended.pass_by(1)
    assert "trainer-0 has not come up yet." in ended.watch.look().text


def test_where_all_groups_are_dropped_that_is_said_first_and_the_run_ends(run):
    run.begin()
    for _ in range(30):
        run.pass_by(0.5)
        run.drop("rollout-0")
        if (stall := run.watch.look()) is not None:
            break
    assert stall.is_final
    assert stall.culprits == ()
    first = stall.text.partition(". ")[0]
    assert "groups were dropped: all 2 responses of each earned the same reward (mean 0)" in first
    assert "check the reward" in first
    assert "So no training step has ended for 1" in stall.text


def test_rewards_that_only_agree_within_a_group_have_another_remedy(run):
    run.begin()
    for i in range(40):
        run.pass_by(0.3)
        run.drop("rollout-0", (float(i % 2),) * 2)
    stall = run.watch.look()
    assert "(mean 0.5)" in stall.text
    assert "rollout.temperature" in stall.text


def test_one_group_that_is_kept_among_those_dropped_is_progress(run):
    run.begin()
    for _ in range(3):
        for _ in range(25):
            run.pass_by(0.3)
            run.drop("rollout-0")
            assert run.watch.look() is None
        (lease,) = run.lease("rollout-1")
        run.watch.delivered(lease.group_id, KEPT, kept=True)


@pytest.mark.parametrize("drops", [1, 2])
def test_a_trainer_that_hangs_is_not_excused_by_drops(run, drops):
    """It has its batch: what comes in beside it, kept or dropped, holds nothing up."""
    run.train()
    for _ in range(12):
        run.pass_by(1)
        if drops:
            drops -= 1
            run.drop("rollout-1")
        if (stall := run.watch.look()) is not None:
            break
    assert stall.culprits == ("trainer-0",)
    assert not stall.is_final
    assert stall.text.startswith("no training step")


def test_an_engine_that_hangs_after_drops_is_what_holds_it_up(run):
    run.begin()
    for _ in range(25):
        run.drop("rollout-0")
    run.lease("rollout-1")
    run.pass_by(11)
    stall = run.watch.look()
    assert stall.culprits == ("rollout-1",)
    assert not stall.is_final
    assert stall.text.startswith("no training step")


def test_patience_for_a_judge_that_is_away_is_no_stall_until_it_is_over(run):
    run.begin()
    run.lease("rollout-0", 2)
    away = Wait("what the reward function judge asks", time.time(), time.time() + 3600)
    run.pulses["rollout-0"] = Pulse(1, 0, [Wait("the rewards of group 0", 0.0), away])
    for _ in range(20):
        run.pass_by(9)
        assert run.watch.look() is None
    run.pulses["rollout-0"] = Pulse(1, 0, [Wait(away.what, 0.0, time.time() - 1)])  # its deadline is over
    run.pass_by(9)
    assert run.watch.look() is None
    run.pass_by(2)
    assert run.watch.look().culprits == ("rollout-0",)
