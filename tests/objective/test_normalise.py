import itertools

import numpy as np
import pytest
import torch

from asyncrl.objective.catalogue import AGGREGATIONS
from asyncrl.objective.normalise import Totals, aggregate, token_mean


def ragged(seed):
    rng = np.random.default_rng(seed)
    sequences = np.repeat(rng.permutation(20), rng.integers(1, 9, 20))
    mask = rng.random(len(sequences)) < 0.6
    values = np.where(mask, rng.normal(size=len(sequences)), np.nan)
    return values, mask, sequences


def reference(name, values, mask, sequences, max_length):
    per_sequence = [values[mask & (sequences == s)] for s in np.unique(sequences[mask])]
    if name == "token_mean":
        return np.concatenate(per_sequence).mean()
    if name == "sequence_mean":
        return np.mean([v.mean() for v in per_sequence])
    return np.mean([v.sum() / max_length for v in per_sequence])


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_parts_add_up_to_the_reference_over_the_whole(name, seed):
    values, mask, sequences = ragged(seed)
    totals = Totals(int(mask.sum()), len(np.unique(sequences[mask])), max_length=32)
    ends = [0, *(1 + np.flatnonzero(np.diff(sequences))), len(sequences)]
    for cuts in ([0, -1], [0, 1, 4, 5, 13, -1]):
        parts = [
            aggregate(
                name, *(torch.from_numpy(x[ends[a] : ends[b]]) for x in (values, mask, sequences)), totals
            )
            for a, b in itertools.pairwise(cuts)
        ]
        assert sum(parts).item() == pytest.approx(reference(name, values, mask, sequences, 32), rel=1e-12)


def test_an_empty_part_adds_nothing():
    nothing = torch.zeros(0, dtype=torch.float64)
    for name in AGGREGATIONS:
        assert aggregate(name, nothing, nothing > 0, nothing.long(), Totals(5, 2, 3)) == 0


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="total_tokens=0"):
        token_mean(torch.zeros(2), torch.zeros(2, dtype=torch.bool), 0)
    none = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="total_sequences=0"):
        aggregate("sequence_mean", torch.zeros(2), none, torch.zeros(2), Totals(0, 0, 3))


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'mean'.*token_mean, sequence_mean, constant_length"):
        aggregate("mean", torch.zeros(1), torch.ones(1) > 0, torch.zeros(1), Totals(1, 1, 1))
