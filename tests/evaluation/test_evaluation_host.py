"""Every prompt of an evaluation is scored once, by the weights that are to be scored, or given up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.config import RolloutConfig
from asyncrl.core.records import GroupSummary, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.evaluation.host import NOT_TRIED, EvaluationHost
from asyncrl.rollout.task import sampling_of

VERSION, ATTEMPTS, PROMPTS = 7, 2, 4
CONFIG = RolloutConfig(group_size=3, max_attempts=ATTEMPTS, temperature=0.7)
WIRE = b"a group"


def a_host():
    """And what it has called."""
    prompts = [Prompt(i, f"held out {i}", np.array([i], np.int32), {}) for i in range(PROMPTS)]
    heard = []
    return EvaluationHost(VERSION, prompts, CONFIG, lambda: heard.append(1)), heard


def submit(host, task, *versions):
    summary = GroupSummary(dict.fromkeys(versions, 1), (1.0, 0.0))
    return host.submit(task.group_id, task.lease_id, task.row, summary, WIRE)


def fail(host, task):
    return host.fail(task.group_id, task.lease_id, "broken", "in full", 3)


def test_what_is_leased_is_told_apart_from_training_and_sampled_as_the_config_says():
    host, _ = a_host()
    assert host.lease("w", VERSION + 1, 9) == []
    first, second = host.lease("w", VERSION, 2)
    assert [t.prompt for t in (first, second)] == ["held out 0", "held out 1"]
    assert {(t.purpose, t.group_size) for t in (first, second)} == {(Purpose.EVAL, 3)}
    assert first.sampling == sampling_of(CONFIG)
    assert first.sampling.temperature == 0.7


def test_what_has_failed_or_was_overtaken_is_leased_again():
    host, heard = a_host()
    first, second, third = host.lease("w", VERSION, 3)
    assert fail(host, first)
    assert submit(host, second, VERSION) is Submission.ACCEPTED
    assert submit(host, third, VERSION, VERSION + 1) is Submission.DROPPED
    fourth, again, anew = host.lease("w", VERSION, 9)
    assert [(t.row, t.attempt) for t in (fourth, again, anew)] == [(3, 0), (0, 1), (2, 0)]
    assert not fail(host, again)
    assert submit(host, fourth, VERSION) is submit(host, anew, VERSION) is Submission.ACCEPTED
    assert host.finished and len(heard) == 6
    assert host.groups.keys() == {1, 2, 3} and host.failed == {0: "in full"}


@pytest.mark.parametrize("succeeds", [False, True])
def test_what_is_wrong_with_all_prompts_is_not_tried_on_all(succeeds):
    """And what fails fast is not all of them: those that are still sampled may be scored."""
    prompts = [Prompt(i, f"{i}", np.array([i], np.int32), {}) for i in range(9)]
    host = EvaluationHost(VERSION, prompts, CONFIG, lambda: None, hopeless_after=3)
    first, second, third, fourth = host.lease("w", VERSION, 4)
    assert fail(host, first) and fail(host, second) and fail(host, third)
    assert not host.has_prompts and host.lease("w", VERSION, 9) == [] and not host.finished
    if succeeds:
        assert submit(host, fourth, VERSION) is Submission.ACCEPTED
        assert [task.row for task in host.lease("w", VERSION, 9)] == [4, 5, 6, 7, 8, 0, 1, 2]
        assert host.failed == {}
    else:
        assert not fail(host, fourth) and host.finished
        assert host.failed == {3: "in full", **dict.fromkeys((4, 5, 6, 7, 8, 0, 1, 2), NOT_TRIED)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_becomes_of_leases_each_prompt_is_done_once(data):
    host, _ = a_host()
    held, attempts = [], dict.fromkeys(range(PROMPTS), 0)
    overtaken = 0
    while not host.finished:
        held += host.lease("w", VERSION, data.draw(st.integers(1, 3)))
        assert len({task.lease_id for task in held}) == len(held)
        task = held.pop(data.draw(st.integers(0, len(held) - 1)))
        assert task.row not in host.groups.keys() | host.failed.keys()
        what = data.draw(st.sampled_from(["sampled", "failed", "overtaken"]))
        if what == "failed":
            attempts[task.row] += 1
            assert fail(host, task) == (attempts[task.row] < ATTEMPTS)
        elif what == "overtaken" and overtaken < 5:
            overtaken += 1
            assert submit(host, task, VERSION, VERSION + 1) is Submission.DROPPED
        else:
            assert submit(host, task, VERSION) is Submission.ACCEPTED
        assert submit(host, task, VERSION) is Submission.SETTLED, "handed in again"
        assert not fail(host, task)
    assert held == [] and host.lease("w", VERSION, 9) == []
    assert sorted([*host.groups, *host.failed]) == list(range(PROMPTS))
    assert all(attempts[row] == ATTEMPTS for row in host.failed)
