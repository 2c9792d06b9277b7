"""The plan of a prefill, and the rows it works on."""

import numpy as np

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.prefill import plan_prefill, prompt_key
from asyncrl.rollout.engines.torch.slots import Slots, version_spans


def request(*prompt: int, new_tokens: int = 4, name: str = "r") -> GenerationRequest:
    return GenerationRequest(name, np.asarray(prompt, np.int32), SamplingParams(new_tokens))


def rows_of(plan) -> list[int]:
    return [row for row, _ in plan.placed]


def test_equal_prompts_are_filled_once():
    plan = plan_prefill(
        [request(1, 2, 3), request(1, 2, 3), request(4, 5), request(1, 2, 3)], [0, 1, 2, 3], [None] * 4, 100
    )
    assert rows_of(plan) == [0, 1, 2, 3]
    assert plan.fills == [0, 2]
    assert plan.shares == [(0, 1, 2), (0, 3, 2)]
    assert plan.copies == []


def test_a_resident_prompt_is_copied_or_left_in_place():
    key = prompt_key(request(1, 2, 3))
    assert plan_prefill([request(1, 2, 3)], [2], [None, key, None], 100).copies == [(1, 2, 2)]
    in_place = plan_prefill([request(1, 2, 3)], [2], [None, key, key], 100)
    assert rows_of(in_place) == [2]
    assert in_place.copies == in_place.fills == in_place.shares == []


def test_a_prompt_of_one_token_needs_nothing():
    plan = plan_prefill([request(7)], [0], [None], 100)
    assert rows_of(plan) == [0]
    assert plan.fills == plan.copies == plan.shares == []


def test_the_budget_counts_padding_and_keeps_the_order():
    waiting = [request(*range(5)), request(*range(1, 10)), request(9, 9)]
    assert rows_of(plan_prefill(waiting, [0, 1, 2], [None] * 3, 16)) == [0, 1]  # 2 rows of 8
    assert rows_of(plan_prefill(waiting, [0, 1, 2], [None] * 3, 15)) == [
        0
    ]  # the short third does not overtake
    assert rows_of(plan_prefill(waiting[1:], [0, 1], [None] * 2, 1)) == [0]  # one alone may pass the budget


def test_no_more_than_there_are_rows():
    assert rows_of(plan_prefill([request(1, 2)] * 3, [5], [None] * 6, 100)) == [5]


def test_equal_bytes_of_other_integer_types_are_other_prompts():
    wide = GenerationRequest("wide", np.asarray([1, 2], np.int64), SamplingParams(4))
    narrow = GenerationRequest("narrow", np.asarray([1, 0, 2, 0], np.int32), SamplingParams(4))
    assert wide.prompt_ids.tobytes() == narrow.prompt_ids.tobytes()
    assert prompt_key(wide) != prompt_key(narrow)
    assert prompt_key(wide) == prompt_key(request(1, 2))


def test_moving_rows_into_holes_keeps_what_they_hold():
    slots = Slots(4, 16)
    for row in range(4):
        slots.admit(row, request(*range(1, row + 2), new_tokens=8, name=f"r{row}"), (50 + row,))
    sampled = np.arange(60, 64)
    for version in (3, 3, 4):
        slots.record(sampled, -sampled.astype(np.float32), version)
    slots.finish(0)
    slots.finish(2)
    assert slots.running == 2
    assert slots.close_holes() == [(3, 0)]
    assert slots.active == 2
    assert slots.find("r3") == 0
    assert slots.find("r2") is None
    done = slots.record(np.array([53, 51]), np.zeros(2, np.float32), 4)  # each row's own stop token
    assert done.tolist() == [0, 1]
    moved, chunk = slots.finish(0)
    assert moved.request_id == "r3"
    assert chunk.token_ids.tolist() == [63, 63, 63, 53]
    assert chunk.logprobs.tolist() == [-63, -63, -63, 0]
    assert chunk.versions == (VersionSpan(0, 2, 3), VersionSpan(2, 2, 4))
    assert chunk.finish_reason is FinishReason.STOP


def test_trailing_holes_close_without_moves():
    slots = Slots(3, 8)
    for row in range(3):
        slots.admit(row, request(1, 2, name=f"r{row}"), ())
    slots.record(np.array([1, 1, 1]), np.zeros(3, np.float32), 0)
    slots.finish(2)
    slots.finish(1)
    assert slots.close_holes() == []
    assert slots.active == 1


def test_a_reused_row_forgets_its_stop_tokens():
    slots = Slots(1, 8)
    slots.admit(0, request(1, 2), (5, 6, 7))
    slots.finish(0)
    slots.admit(0, request(1, 2), (9,))
    assert slots.record(np.array([6]), np.zeros(1, np.float32), 0).tolist() == []
    assert slots.record(np.array([9]), np.zeros(1, np.float32), 0).tolist() == [0]


def test_version_spans():
    assert version_spans(np.array([], np.int32)) == ()
    assert version_spans(np.array([2, 2, 2])) == (VersionSpan(0, 3, 2),)
    assert version_spans(np.array([2, 3, 3, 5])) == (
        VersionSpan(0, 1, 2),
        VersionSpan(1, 2, 3),
        VersionSpan(3, 1, 5),
    )
