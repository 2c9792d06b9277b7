import numpy as np
import pytest
import torch
from batches import kept_table, with_kept_sets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.packing.batch import flatten
from asyncrl.trainer.packing.pack import ONE_SEQUENCE, make_micro_batch, pack_lengths
from asyncrl.trainer.packing.prefix import shared_units, single_units

lengths_lists = st.lists(st.integers(1, 50), min_size=0, max_size=60)


@given(lengths_lists, st.integers(1, 120), st.sampled_from([1, 16, 64, 10**9]))
def test_every_item_goes_once_and_no_micro_batch_exceeds_the_budget(lengths, budget, min_row):
    layouts = pack_lengths(lengths, budget, min_row)
    placed = [i for layout in layouts for row in layout.rows for i in row]
    assert sorted(placed) == list(range(len(lengths)))
    for layout in layouts:
        totals = [sum(lengths[i] for i in row) for row in layout.rows]
        assert max(totals) == layout.row_tokens
        assert layout.padded_tokens <= budget or len(layout.rows) == len(layout.rows[0]) == 1
    assert pack_lengths(lengths, budget, min_row) == layouts


@given(lengths_lists, st.integers(1, 120))
def test_items_that_must_not_meet_get_rows_of_their_own_beside_items_of_like_length(lengths, budget):
    layouts = pack_lengths(lengths, budget, ONE_SEQUENCE)
    rows = [row for layout in layouts for row in layout.rows]
    assert all(len(row) == 1 for row in rows)
    in_order = [lengths[item] for (item,) in rows]
    assert in_order == sorted(lengths, reverse=True)
    for layout in layouts:
        assert layout.row_tokens == lengths[layout.rows[0][0]]
        assert layout.padded_tokens <= budget or len(layout.rows) == 1


@given(lengths_lists, st.integers(1, 120))
def test_a_micro_batch_of_one_flat_row_has_no_padding(lengths, budget):
    for layout in pack_lengths(lengths, budget, min_row_tokens=10**9):
        assert len(layout.rows) == 1
        assert layout.padded_tokens == sum(lengths[i] for i in layout.rows[0])


def test_rows_fill_up():
    layouts = pack_lengths([30, 10, 20, 20, 10, 30], max_tokens=90, min_row_tokens=1)
    assert [layout.rows for layout in layouts] == [((0,), (5,), (2, 1)), ((3,), (4,))]
    assert [layout.row_tokens for layout in layouts] == [30, 20]


def units_of(flat, *, sharing, max_tokens=64):
    lengths = flat.trained_lengths()
    return lengths, shared_units(flat, lengths, max_tokens) if sharing else single_units(lengths)


@pytest.mark.parametrize("sharing", [False, True])
def test_assembled_rows_hold_the_sequences_and_point_from_the_token_before(random_batch, sharing):
    flat = flatten(random_batch(2, version=4, oldest_version=1))
    lengths, units = units_of(flat, sharing=sharing)
    seen = []
    for layout in pack_lengths([unit.tokens for unit in units], 64, 24):
        micro = make_micro_batch(flat, lengths, units, layout)
        ids = micro.input_ids.flatten().numpy()
        # Whatever the layout, each hidden state has just read the token before the one it predicts.
        np.testing.assert_array_equal(
            ids[micro.predicted_from.numpy()], flat.token_ids[micro.token_index.numpy() - 1]
        )
        positions = micro.position_ids.flatten().numpy()[micro.predicted_from.numpy()]
        starts = flat.offsets[np.searchsorted(flat.offsets, micro.token_index.numpy(), side="right") - 1]
        np.testing.assert_array_equal(positions, micro.token_index.numpy() - starts - 1)
        seen.append(micro.token_index.numpy())
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.flatnonzero(flat.loss_mask))


@given(seed=st.integers(0, 1000), max_tokens=st.integers(1, 200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shared_units_hold_every_sequence_once_with_the_prefix_they_really_share(
    random_batch, seed, max_tokens
):
    flat = flatten(random_batch(seed, groups=3, group_size=5))
    lengths, units = units_of(flat, sharing=True, max_tokens=max_tokens)
    assert sorted(s for unit in units for s in unit.members) == np.flatnonzero(lengths).tolist()
    for unit in units:
        begin = [flat.token_ids[flat.offsets[s] : flat.offsets[s] + unit.prefix_tokens] for s in unit.members]
        assert all(np.array_equal(begin[0], other) for other in begin)
        assert all(lengths[s] >= unit.prefix_tokens for s in unit.members)
        rest = sum(int(lengths[s]) - unit.prefix_tokens for s in unit.members)
        assert unit.tokens == unit.prefix_tokens + rest
        assert unit.tokens <= max_tokens or len(unit.members) == 1
        assert len({flat.group_ids[s] for s in unit.members}) == 1


def test_a_prompt_is_computed_once_for_its_group(random_batch):
    flat = flatten(random_batch(0, groups=2, group_size=6))
    lengths, units = units_of(flat, sharing=True, max_tokens=10_000)
    assert [len(unit.members) for unit in units] == [6, 6]
    assert sum(unit.tokens for unit in units) < sum(lengths) - 5 * sum(u.prefix_tokens for u in units) + 1


def objective(logprobs, entropy, token_index):
    """Some function of logprobs and entropy with a different weight for every token."""
    weight = torch.sin(token_index.float() + 1)
    return (weight * logprobs).sum() + 0.3 * (weight.square() * entropy).sum()


def separate(model, flat):
    """Each sequence alone through the model's own head, without any of our code."""
    total, out = 0.0, {}
    kept = None if flat.kept is None else kept_table(flat.kept)
    for start, end in zip(flat.offsets[:-1], flat.offsets[1:], strict=True):
        at = torch.from_numpy(start + np.flatnonzero(flat.loss_mask[start:end]))
        ids = torch.from_numpy(flat.token_ids[start:end])
        logits = model(input_ids=ids[None]).logits[0].float()[at - start - 1]
        if kept is not None:
            logits = logits.masked_fill(~kept[at], -1e30)
        log_probs = logits.log_softmax(-1)
        logprobs = log_probs.gather(-1, ids[at - start, None]).squeeze(-1)
        total = total + objective(logprobs, -(log_probs.exp() * log_probs).sum(-1), at)
        out.update(zip(at.tolist(), logprobs.tolist(), strict=True))
    total.backward()
    return out


SIZES = [(1, 1), (40, 1), (100, 64), (10_000, 1), (10_000, 128), (10_000, 10**9)]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize(
    ("budget", "row", "cut"),
    [
        *((budget, row, False) for budget, row in SIZES),
        *((1, 1, True), (100, 64, True), (10_000, 10**9, True)),
    ],
)
def test_packed_equals_separate_in_logprobs_and_gradients(
    make_qwen3, random_batch, attention, sharing, budget, row, cut
):
    """Also where every token was sampled among a set of its own (`cut`)."""
    batch = random_batch(3, version=4, oldest_version=1)
    flat = flatten(with_kept_sets(batch) if cut else batch)
    lengths, units = units_of(flat, sharing=sharing)
    model = make_qwen3()
    expected = separate(model, flat)
    model.set_attn_implementation(attention)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    policy = Policy(model, temperature=1.0, chunk_tokens=16)
    got = {}
    for layout in pack_lengths([unit.tokens for unit in units], budget, row):
        micro = make_micro_batch(flat, lengths, units, layout)
        targets = torch.from_numpy(flat.token_ids)[micro.token_index]
        logprobs, entropy = policy(micro, targets)
        objective(logprobs, entropy, micro.token_index).backward()
        got.update(zip(micro.token_index.tolist(), logprobs.tolist(), strict=True))

    assert got.keys() == expected.keys()
    assert max(abs(got[t] - expected[t]) for t in got) < 1e-5
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
