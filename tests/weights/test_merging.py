"""Merging an adapter into its base."""

import pytest
import torch

from asyncrl.weights.adapters import merge


@pytest.mark.parametrize("rank", [3, 16, 100])
def test_weights_merge_to_the_same_bits_in_whichever_order_products_are_summed(rank):
    """Bases with which the sums lie next to the middle between two numbers, where their last bit decides: a
    device, or another number of threads, may sum up in another order."""
    torch.manual_seed(0)
    a, b = torch.randn(rank, 400), torch.randn(300, rank)
    product = b.double() @ a.double()
    down = product.float()
    middle = (down.double() + torch.nextafter(down, torch.tensor(torch.inf)).double()) / 2
    base = (middle - product).float()
    for order in (torch.arange(rank).flip(0), torch.randperm(rank), torch.randperm(rank)):
        assert torch.equal(merge(base, a[order], b[:, order], 1.0), merge(base, a, b, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_is_the_base_and_the_product_rounded_once(dtype):
    torch.manual_seed(0)
    base, a, b = (t.to(dtype) for t in (torch.randn(50, 40), torch.randn(8, 40), torch.randn(50, 8) / 64))
    exact = base.double() + 1.5 * b.double() @ a.double()
    merged = merge(base, a, b, 1.5)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
    assert ((merged.double() - exact).abs() <= 0.51 * spacing).all()
    assert torch.equal(merge(base, a, torch.zeros_like(b), 1.5), base)
