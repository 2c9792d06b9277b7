"""The plan of a prefill, and the rows it works on."""

import numpy as np

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.prefill import plan_prefill
from asyncrl.rollout.engines.torch.slots import Slots, version_spans


def request(
    *prompt: int, new_tokens: int = 4, name: str = "r", since: int | None = None
) -> GenerationRequest:
    return GenerationRequest(name, np.asarray(prompt, np.int32), SamplingParams(new_tokens), since)


def plan_of(waiting, places, *, rows=6, held=(), budget=100, version=0):
    """held: (row, prompt, output) of what has ended, in that order, and the oldest version that has computed
    it if not 0; other rows have never been used."""
    slots = Slots(rows, 64)
    for row, prompt, output, *oldest in held:
        slots.active = row
        slots.admit(row, request(*prompt, new_tokens=max(len(output), 1)), (), 0, *oldest)
        slots.tokens[row, len(prompt) : len(prompt) + len(output)] = output
        slots.length[row] += len(output)
    spare = [row for row, *_ in held if row not in places]
    return plan_prefill(waiting, places, spare, slots, version, budget)


def rows_of(plan) -> list[int]:
    return [row for row, *_ in plan.placed]


def known(plan) -> list[int]:
    return [known for *_, known, _ in plan.placed]


def filled(plan) -> list[list[int]]:
    return [fill.rows for fill in plan.fills]


def test_equal_prompts_are_filled_once():
    waiting = [request(1, 2, 3), request(1, 2, 3), request(4, 5), request(1, 2, 3)]
    plan = plan_of(waiting, [0, 1, 2, 3])
    assert rows_of(plan) == [0, 1, 2, 3]
    assert filled(plan) == [[0, 2], []]
    assert plan.shares == [(0, 1, 2), (0, 3, 2)]
    assert plan.copies == []
    assert known(plan) == [0, 2, 0, 2]


def test_a_resident_prompt_is_copied_or_left_in_place():
    assert plan_of([request(1, 2, 3)], [2], held=[(1, [1, 2, 3], [])]).copies == [(1, 2, 2)]
    in_place = plan_of([request(1, 2, 3)], [2], held=[(2, [1, 2, 3], [])])
    assert rows_of(in_place) == [2]
    assert in_place.copies == in_place.kept == in_place.shares == []
    assert filled(in_place) == [[], []]


def test_a_prompt_of_one_token_needs_nothing():
    plan = plan_of([request(7)], [0])
    assert rows_of(plan) == [0]
    assert plan.shares == plan.copies == []
    assert filled(plan) == [[], []]


def test_the_budget_counts_padding_and_keeps_the_order():
    waiting = [request(*range(5)), request(*range(1, 10)), request(9, 9)]
    assert rows_of(plan_of(waiting, [0, 1, 2], budget=16)) == [0, 1]  # 2 rows of 8
    assert rows_of(plan_of(waiting, [0, 1, 2], budget=15)) == [0]  # the short third does not overtake
    assert rows_of(plan_of(waiting[1:], [0, 1], budget=1)) == [0]  # one alone may pass the budget


def test_no_more_than_there_are_rows():
    assert rows_of(plan_of([request(1, 2)] * 3, [5])) == [5]


def test_equal_bytes_of_other_integer_types_are_other_prompts():
    wide = GenerationRequest("wide", np.asarray([1, 2, 3], np.int64), SamplingParams(4))
    narrow = GenerationRequest("narrow", np.asarray([1, 0, 2, 0, 3, 0], np.int32), SamplingParams(4))
    assert wide.prompt_ids.tobytes() == narrow.prompt_ids.tobytes()
    assert filled(plan_of([wide, narrow, request(1, 2, 3)], [0, 1, 2])) == [[0, 1], []]


def test_a_next_turn_computes_what_its_row_does_not_hold():
    """The last sampled token has no keys and values yet."""
    held = [(0, [1, 2, 3], [4, 5]), (4, [7, 8, 9], [1])]
    plan = plan_of([request(1, 2, 3, 4, 5, 6, 7, 8), request(7, 8, 9, 2, 2)], [0, 1], held=held)
    assert known(plan) == [4, 3]
    assert filled(plan) == [[], [0, 1]]
    assert plan.fills[1].tokens == 3
    assert plan.copies == [(4, 1, 3)]


def test_a_prompt_goes_on_only_from_a_row_whose_own_prompt_it_begins_with():
    """Or that begins with it. What is told to all alike is not worth a copy."""
    held = [(0, [1, 2, 3, 4], [5, 6])]
    assert known(plan_of([request(1, 2, 3, 9, 9)], [1], held=held)) == [0]
    assert known(plan_of([request(1, 2, 3, 4, 9)], [1], held=held)) == [4]
    assert known(plan_of([request(1, 2, 3)], [1], held=held)) == [2]


def test_only_what_is_no_older_than_its_episode_is_gone_on_from():
    """And what goes on from it is as old, for all that come after."""
    held = [(0, [1, 2, 3], [4, 5], 2), (1, [1, 2, 3], [4, 5], 3)]
    turns = [request(1, 2, 3, 4, 5, 9, since=since) for since in (2, 3, 4, None)]
    plans = [plan_of([turn], [4], held=held, version=4) for turn in turns]
    assert [plan.placed[0][2:] for plan in plans] == [(4, 2), (4, 3), (0, 4), (0, 4)]


def test_equal_prompts_of_other_ages_are_filled_apart():
    """A new episode's has nothing of what an older one goes on from, wherever it stands in the queue."""
    old, new = request(1, 2, 3, 4, 5, 9, since=2), request(1, 2, 3, 4, 5, 9)
    for waiting in ([old, new, old, new], [new, old, new, old]):
        plan = plan_of(waiting, [2, 3, 4, 5], held=[(0, [1, 2, 3], [4, 5], 2)], version=4)
        assert known(plan) == [4 if r is old else 0 for r in waiting[:2]] + [5, 5]
        assert plan.shares == [(2, 4, 5), (3, 5, 5)]
        assert [oldest for *_, oldest in plan.placed] == [2 if r is old else 4 for r in waiting]


def test_what_is_in_the_way_changes_places_with_what_is_used():
    held = [(0, [1, 1, 1], [2]), (3, [4, 4, 4], [5]), (4, [6, 6, 6], [7])]
    plan = plan_of([request(4, 4, 4, 5, 8)], [0], held=held)
    assert plan.copies == [(3, 0, 3)]
    assert plan.kept == [(0, 3)]


def test_a_new_group_leaves_what_waits_in_all_the_places_that_it_takes():
    """Its members share one prompt, and no row of it was there before."""
    held = [(0, [1, 1, 1], [2]), (1, [2, 2, 2], [3])]
    slots_and_spare = [*held, (3, [4, 4, 4], [5]), (4, [6, 6, 6], [7])]
    plan = plan_of([request(9, 9, 9)] * 2, [0, 1], held=[*slots_and_spare[2:], *held])
    assert plan.shares == [(0, 1, 2)]
    assert plan.kept == [(0, 3), (1, 4)]


def test_the_least_recently_used_goes_first():
    held = [(3, [4, 4, 4], [5]), (4, [6, 6, 6], [7]), (0, [1, 1, 1], [2])]
    assert plan_of([request(9, 9)], [0], held=held).kept == [(0, 3)]
    assert plan_of([request(9, 9)], [0], held=[held[2], held[0]]).kept == []
    two = plan_of([request(9, 9), request(8, 8)], [0, 1], held=[*held, (1, [2, 2, 2], [3])])
    assert two.kept == [(0, 3), (1, 4)]


def test_a_branch_and_its_sibling_go_on_from_one_row():
    """The first takes the row's place, the second a copy."""
    held = [(3, [1, 2, 3], [4])]
    plan = plan_of([request(1, 2, 3, 4, 5), request(1, 2, 3, 4, 6, 7)], [0, 1], held=held)
    assert plan.copies == [(3, 0, 3), (3, 1, 3)]
    assert filled(plan) == [[], [0, 1]]


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
    assert slots.close_holes() == [(3, 0), (0, 3)]
    assert slots.active == 2
    assert slots.find("r3") == 0
    assert slots.find("r2") is None
    assert slots.tokens[3, : slots.length[3]].tolist() == [1, 60, 60, 60], "what has ended has changed places"
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
