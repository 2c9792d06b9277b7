import pytest
import torch
from torch import nn

from asyncrl.config import TrainerConfig
from asyncrl.trainer.learner import MAX_SKIPPED_UPDATES, NonFiniteGradientError, TorchLearner


def settings(**changes):
    return TrainerConfig(**{"lr": 0.1, "max_grad_norm": 1e9, **changes})


def backward(parameters, scale=1.0):
    loss = sum((p.float() * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in parameters) * scale
    loss.backward()


def make_parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(4, 3, generator=g).to(dtype)),
        nn.Parameter(torch.randn(5, generator=g).to(dtype)),
    ]


def reference_adamw(p, m, v, grad, *, lr, step, betas, eps, weight_decay):
    """Loshchilov, Hutter 2019 (arXiv 1711.05101), algorithm 2."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p), m, v


def test_updates_are_adamw_with_decay_on_matrices_only():
    parameters = make_parameters()
    config = settings(weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    optimizer = TorchLearner(nn.ParameterList(parameters), config)
    expected = [
        (p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double())
        for p in parameters
    ]
    for step, lr in enumerate([0.1, 0.05, 0.2], start=1):
        backward(parameters, scale=step)
        grads = [p.grad.double() for p in parameters]
        optimizer.update(lr, step)
        expected = [
            reference_adamw(
                *state,
                grad,
                lr=lr,
                step=step,
                betas=config.betas,
                eps=config.eps,
                weight_decay=0.3 if state[0].ndim > 1 else 0.0,
            )
            for state, grad in zip(expected, grads, strict=True)
        ]
        assert all(p.grad is None for p in parameters)
    for p, (value, _, _) in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_scaled_down_to_the_global_norm_and_its_own_norm_reported():
    parameters = make_parameters()
    # eps far above the gradients makes an Adam update linear in the gradient, so that scaling shows.
    config = {"eps": 1e6, "betas": (0.0, 0.0)}
    backward(parameters, scale=10)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
    expected = [p.detach() - 1e5 * p.grad * (2.0 / norm) / 1e6 for p in parameters]
    update = TorchLearner(nn.ParameterList(parameters), settings(max_grad_norm=2.0, **config)).update(1e5, 0)
    assert update.grad_norm == pytest.approx(norm)
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_follow_float32_masters_through_updates_too_small_for_them():
    parameters = make_parameters(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in parameters]
    start = [p.detach().clone() for p in parameters]
    optimizer, reference = (
        TorchLearner(nn.ParameterList(parameters), settings()),
        TorchLearner(nn.ParameterList(exact), settings()),
    )
    for step in range(100):
        backward(parameters)
        backward(exact)
        optimizer.update(1e-4, step)
        reference.update(1e-4, step)
        if step == 0:  # 1e-4 is below the spacing of bfloat16 numbers around 1
            assert sum((p != s).sum() for p, s in zip(parameters, start, strict=True)) <= 4
    for p, q in zip(parameters, exact, strict=True):
        assert torch.equal(p, q.to(torch.bfloat16))


def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = TorchLearner(nn.ParameterList([parameter]), settings())
    (parameter * 256.0).sum().backward()
    for _ in range(64):
        (parameter * 0.5).sum().backward()  # in bfloat16, 256 + 0.5 is 256
    assert parameter.grad is None
    assert optimizer.update(0.1, 0).grad_norm == 256 + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_refused(dtype):
    parameters = make_parameters(dtype)
    optimizer = TorchLearner(nn.ParameterList(parameters), settings())
    before = [p.detach().clone() for p in parameters]
    for _ in range(MAX_SKIPPED_UPDATES - 1):
        backward(parameters, scale=float("inf"))
        assert not optimizer.update(0.1, 4).applied
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)
    backward(parameters)
    assert optimizer.update(0.1, 5).applied
    assert all(torch.isfinite(p).all() for p in parameters)
    with pytest.raises(NonFiniteGradientError, match="training step 7"):
        for step in range(5, 10):
            backward(parameters, scale=float("nan"))
            optimizer.update(0.1, step)


def test_frozen_parameters_stay():
    parameters = make_parameters()
    parameters[1].requires_grad_(False)
    before = parameters[1].detach().clone()
    optimizer = TorchLearner(nn.ParameterList(parameters), settings())
    parameters[0].sum().backward()
    optimizer.update(0.1, 0)
    assert torch.equal(parameters[1], before)
