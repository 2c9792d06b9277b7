"""Where every role's time goes, from readings of their clocks."""

from dataclasses import dataclass, field

from asyncrl.observe.role_meter import RoleMeter, by_kind, in_words, of_metric, times


@dataclass
class Reading:
    pid: int
    states_s: dict = field(default_factory=dict)
    rss_bytes: int = 7


def test_what_was_spent_between_two_readings_and_all_of_a_new_process():
    meter = RoleMeter({"rollout-0": Reading(1, {"start": 2.0})})  # counted by the coordinator before this one
    readings = {
        "rollout-0": Reading(1, {"start": 2.0, "swap": 1.5}),
        "rollout-1": Reading(2),
        "trainer-0": Reading(3, {"start": 1.0}),  # it says so itself
    }
    memory = {f"memory/{role}_rss_bytes": 7 for role in readings}
    assert meter.metrics(readings) == memory | {"state/rollout-0/swap_s": 1.5}
    assert meter.metrics(readings) == memory
    third = meter.metrics({"rollout-0": Reading(9, {"start": 3.0, "swap": 2.0})})  # another process
    assert (third["state/rollout-0/start_s"], third["state/rollout-0/swap_s"]) == (3.0, 2.0)


def test_all_lines_together_by_role_and_by_kind():
    lines = [
        {
            "state/rollout-1/generate_s": 3.0,
            "state/rollout-0/wait_work_s": 1.0,
            "state/rollout-0/generate_s": 1,
        },
        {"state/rollout-0/generate_s": 2.0, "state/trainer-0/optimizer_s": float("nan"), "step": 2},
    ]
    assert times(lines) == {
        "rollout-0": {"generate": 3.0, "wait_work": 1.0},
        "rollout-1": {"generate": 3.0},
    }
    kinds = by_kind(times(lines))
    assert kinds == {"rollout": {"generate": 6.0, "wait_work": 1.0}}
    assert in_words(kinds["rollout"]) == "86% generate, 14% wait work"


def test_names():
    assert of_metric("state/reward-1/score_s") == ("reward-1", "score")
    assert of_metric("state/reward-1/dream_s") is None
    assert of_metric("time/wait_s") is None
