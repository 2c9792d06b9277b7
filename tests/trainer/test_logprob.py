import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import kept_table

from asyncrl.core.kept import KeptSets
from asyncrl.trainer.kernels.logprob import LogitShape, token_logprobs


def inputs(n=37, hidden=16, vocabulary=53, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(0)
    h = (torch.randn(n, hidden, generator=g) * scale).to(dtype)
    w = torch.randn(vocabulary, hidden, generator=g).to(dtype)
    b = torch.randn(vocabulary, generator=g).to(dtype)
    return h, w, b, torch.randint(vocabulary, (n,), generator=g)


def naive(hidden, weight, bias, targets, temperature, bend=lambda logits: logits):
    logits = bend(torch.nn.functional.linear(hidden, weight, bias))
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probs = (logits.to(precise) / temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def gradients(function, tensors, use_entropy):
    leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
    logprobs, entropy = function(*leaves)
    weights = torch.linspace(-1, 2, len(logprobs))
    loss = (weights * logprobs).sum()
    if use_entropy:
        loss = loss + (weights.flip(0) * entropy).sum()
    loss.backward()
    return logprobs.detach(), entropy.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("use_entropy", [False, True])
def test_values_and_gradients_equal_the_naive_head(chunk, temperature, with_bias, use_entropy):
    h, w, b, targets = inputs()

    def fused(h, w, b=None):
        return token_logprobs(h, w, targets, head_bias=b, temperature=temperature, chunk_tokens=chunk)

    def plain(h, w, b=None):
        return naive(h, w, b, targets, temperature)

    tensors = (h, w, b if with_bias else None)
    for got, expected in zip(
        gradients(fused, tensors, use_entropy), gradients(plain, tensors, use_entropy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_bias_that_masks_a_token_leaves_the_entropy_and_gradients_of_the_others():
    h, w, b, targets = inputs(dtype=torch.float64)
    masked = torch.isin(torch.arange(len(b)), torch.tensor([3, 40]))
    targets = torch.where(masked[targets], 7, targets)
    place = (~masked).cumsum(0) - 1

    def fused(h, w, b):
        b = torch.where(masked, -torch.inf, b)
        return token_logprobs(h, w, targets, head_bias=b, chunk_tokens=8)

    def plain(h, w, b):
        return naive(h, w[~masked], b[~masked], place[targets], 1.0)

    expected = gradients(plain, (h, w, b), use_entropy=True)
    torch.testing.assert_close(gradients(fused, (h, w, b), use_entropy=True), expected)
    bias = torch.where(masked, -torch.inf, b)
    assert token_logprobs(h, w, torch.full_like(targets, 3), head_bias=bias)[0].isneginf().all()


def test_gradcheck_in_double():
    h, w, b, targets = inputs(5, 4, 7, torch.float64)
    for t in (h, w, b):
        t.requires_grad_()

    def f(h, w, b):
        return token_logprobs(h, w, targets[:5], head_bias=b, temperature=0.8, chunk_tokens=2)

    assert torch.autograd.gradcheck(f, (h, w, b))


def test_bfloat16_gives_the_results_of_float32_and_gradients_as_near_the_truth_as_the_naive_head():
    h, w, b, targets = inputs(200, 32, 101, torch.bfloat16, scale=3.0)
    exact = gradients(lambda h, w, b: naive(h, w, b, targets, 1.0), (h.float(), w.float(), b.float()), True)
    plain = gradients(lambda h, w, b: naive(h, w, b, targets, 1.0), (h, w, b), True)
    fused = gradients(
        lambda h, w, b: token_logprobs(h, w, targets, head_bias=b, chunk_tokens=64), (h, w, b), True
    )
    assert fused[0].dtype == fused[1].dtype == torch.float32
    for ours, theirs, truth in zip(fused[:2], plain[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=2e-5)
        assert (theirs - truth).abs().max() > 0.05  # what it was when logits were rounded
    for ours, theirs, truth in zip(fused[2], plain[2], exact[2], strict=True):
        assert ours.dtype == torch.bfloat16
        error, naive_error = ((x.float() - truth).norm() / truth.norm() for x in (ours, theirs))
        assert error <= 0.5 * naive_error
        assert error < 4e-3  # two roundings to bfloat16, 2^-9 at most each


BENT = [
    (LogitShape(scale=0.3), lambda z: z * 0.3),
    (LogitShape(cap=5.0), lambda z: torch.tanh(z / 5) * 5),
    (LogitShape(scale=2.0, cap=3.0), lambda z: torch.tanh(2 * z / 3) * 3),
]


@pytest.mark.parametrize(("shape", "bend"), BENT)
@pytest.mark.parametrize("use_entropy", [False, True])
def test_scaled_and_capped_logits_are_exact(shape, bend, use_entropy):
    """Against autograd through the formulas in float64, forward and backward."""
    h, w, b, targets = inputs(dtype=torch.float64)

    def fused(h, w, b):
        return token_logprobs(h, w, targets, head_bias=b, shape=shape, temperature=0.7, chunk_tokens=8)

    def plain(h, w, b):
        return naive(h, w, b, targets, 0.7, bend)

    expected = gradients(plain, (h, w, b), use_entropy)
    torch.testing.assert_close(gradients(fused, (h, w, b), use_entropy), expected, rtol=1e-10, atol=1e-10)
    in_32_bits = gradients(fused, (h.float(), w.float(), b.float()), use_entropy)
    rounded = tuple(
        [t.float() for t in part] if isinstance(part, list) else part.float() for part in expected
    )
    torch.testing.assert_close(in_32_bits, rounded, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 8, 37])
@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.parametrize(("shape", "bend"), [(LogitShape(), lambda z: z), *BENT[1:]])
def test_renormalised_over_kept_sets_it_is_the_softmax_of_these_alone(chunk, use_entropy, shape, bend):
    """Values and gradients, against autograd in float64 through the logits of each token's own set."""
    h, w, b, targets = inputs(dtype=torch.float64)
    rng, sets = np.random.default_rng(0), []
    for i, target in enumerate(targets.tolist()):
        among = rng.random(len(w)) < 0.3
        among[target] = True
        sides = (np.flatnonzero(among), ~np.flatnonzero(~among), np.empty(0))
        sets.append(sides[i % 3].astype(np.int32))
    kept = KeptSets.of(sets)
    table = kept_table(kept, len(w))

    def fused(h, w, b):
        options = {"shape": shape, "temperature": 0.6, "chunk_tokens": chunk}
        return token_logprobs(h, w, targets, head_bias=b, kept=kept, **options)

    def plain(h, w, b):
        logits = bend(torch.nn.functional.linear(h, w, b)) / 0.6
        rows = [logits[i, among].log_softmax(-1) for i, among in enumerate(table)]
        place = [int(among[:target].sum()) for among, target in zip(table, targets, strict=True)]
        logprobs = torch.stack([row[at] for row, at in zip(rows, place, strict=True)])
        return logprobs, torch.stack([-(row.exp() * row).sum() for row in rows])

    expected = gradients(plain, (h, w, b), use_entropy)
    torch.testing.assert_close(gradients(fused, (h, w, b), use_entropy), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_away_from_the_cpu_torch_takes_the_same_products(dtype):
    """What a GPU is asked for, checked by torch's own kernels for shapes and dtypes."""
    tensors = [t.to("meta").requires_grad_() for t in inputs(dtype=dtype)[:3]]
    targets = torch.zeros(37, dtype=torch.int64, device="meta")
    logprobs, entropy = token_logprobs(*tensors[:2], targets, head_bias=tensors[2], chunk_tokens=16)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (logprobs + entropy).sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.shape == t.shape for t in tensors)


def test_large_logits_keep_the_precision_of_float32():
    h, w, b, targets = inputs(scale=200.0)
    exact = naive(h.double(), w.double(), b.double(), targets, 1.0)
    got = token_logprobs(h, w, targets, head_bias=b, chunk_tokens=8)
    torch.testing.assert_close(got[1], exact[1].float(), rtol=1e-3, atol=1e-3)
    assert (got[1] >= 0).all()


def test_only_what_needs_a_gradient_gets_one():
    h, w, _, targets = inputs()
    h.requires_grad_()
    token_logprobs(h, w, targets, chunk_tokens=8)[1].sum().backward()
    assert h.grad is not None
    assert w.grad is None


def test_no_tokens_are_fine():
    h, w, _, targets = inputs()
    h.requires_grad_()
    logprobs, entropy = token_logprobs(h[:0], w, targets[:0])
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert (h.grad == 0).all()


def test_greedy_sampling_has_no_log_probabilities():
    h, w, _, targets = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(h, w, targets, temperature=0)


@pytest.mark.slow
def test_the_memory_benchmark_runs():
    script = Path(__file__).parents[2] / "benchmarks/logprob_memory.py"
    sizes = ["--tokens", "512", "--vocabulary", "4000", "--hidden", "32", "--chunk-tokens", "64"]
    done = subprocess.run(
        [sys.executable, script, *sizes], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fused" in done.stdout
    assert "naive" in done.stdout
