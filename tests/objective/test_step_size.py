import numpy as np
import pytest
import torch

from asyncrl.objective.step_size import ess_share, ess_sums, sequence_sums, vcpo_lr_scale


def test_the_scale_is_the_root_of_the_effective_share():
    log_w = np.random.default_rng(0).normal(0, 1, 50)
    w = np.exp(log_w)
    share = w.sum() ** 2 / (w**2).sum() / 50
    parts = [ess_sums(torch.from_numpy(part)) for part in (log_w[:7], log_w[7:7], log_w[7:])]
    assert ess_share(torch.stack(parts)) == pytest.approx(share)
    assert vcpo_lr_scale(torch.from_numpy(log_w)) == pytest.approx(share**0.5)


def test_on_policy_the_learning_rate_is_whole_and_one_outlier_takes_most_of_it():
    assert vcpo_lr_scale(torch.zeros(8)) == pytest.approx(1)
    assert vcpo_lr_scale(torch.tensor([0.0] * 15 + [5000.0])) == pytest.approx(0.25)
    assert vcpo_lr_scale(torch.zeros(0)) == 1


def test_a_common_factor_of_all_ratios_does_not_matter():
    log_w = torch.randn(30, dtype=torch.float64)
    assert vcpo_lr_scale(log_w + 400) == pytest.approx(vcpo_lr_scale(log_w))


def test_sums_are_over_the_unmasked_tokens_of_each_sequence():
    sums = sequence_sums(
        torch.tensor([1.0, float("nan"), 2.0, 4.0, float("nan")]),
        torch.tensor([7, 7, 3, 7, 5]),
        torch.tensor([True, False, True, True, False]),
    )
    assert sums.tolist() == [2.0, 5.0]
    assert len(sequence_sums(torch.zeros(2), torch.zeros(2), torch.zeros(2) > 0)) == 0


def test_the_learning_rate_is_whole_from_the_base_share_on():
    log_w = torch.tensor([0.0] * 15 + [5000.0])  # ESS / B = 1/16
    assert vcpo_lr_scale(log_w, ess_base=0.25) == pytest.approx(0.5)
    assert vcpo_lr_scale(log_w, ess_base=0.03) == 1


def test_ratios_that_are_all_zero_have_no_effective_sample():
    assert ess_share(ess_sums(torch.tensor([-torch.inf, -torch.inf]))[None]) == 0
