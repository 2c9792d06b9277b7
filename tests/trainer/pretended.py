"""A device that is not the host, pretended on the CPU: an op, a copy or a collective may mix here what it may
mix on a machine with GPUs.

Inside `pretended_device`, `tensor.to(DEVICE)` gives a tensor that says it lies on DEVICE. Ops on it compute
on the CPU and give tensors on DEVICE; ops on tensors of both raise, as CUDA's do; `numpy()` needs `cpu()`
first. A collective finds the process group's backend by the tensor's device, as torch does.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")
"""One of torch's own kinds, of which no kernel is ever called: autograd runs it in the caller's thread."""
HOST = torch.device("cpu")

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


PRODUCTS = {  # which torch has for GPUs only
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.addmm.dtype_out: lambda c, a, b, dtype, out: torch.addmm(c, a.to(dtype), b.to(dtype), out=out),
}


class Pretended(torch.Tensor):
    """A tensor on DEVICE; `inner` is where its numbers are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Pretended({self.inner!r})"

    def tolist(self):  # which torch refuses subclasses
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextmanager
def pretended_device():
    with _Mode():
        yield


def run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    if func.namespace == "c10d":
        return _collective(func, args, kwargs, tensors)
    wanted = kwargs.get("device")
    to = torch.device(wanted).type if wanted is not None else (DEVICE if here else HOST).type
    if func not in COPIES:
        _refuse_mixture(func, tensors, here)
    inner = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
    if wanted is not None:
        inner[1]["device"] = HOST
    if func is aten._to_copy.default and tensors[0].device.type != to:
        out = tensors[0].inner.clone() if here else tensors[0].clone()
        out = func(out, **inner[1])
    else:
        out = PRODUCTS.get(func, func)(*inner[0], **inner[1])
    if func is aten.copy_.default:
        return args[0]
    if to == HOST.type:
        return out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if here else out


def _refuse_mixture(func, tensors, here):
    """Numbers without dimensions, and indices, may come from the host."""
    if not here:
        return
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if func in INDEXING:
        strangers = [t for t in strangers if t.dtype not in (torch.int64, torch.bool)]
    if strangers:
        raise RuntimeError(f"{func}: expected all tensors on one device, and got {DEVICE.type} and cpu")


def _collective(func, args, kwargs, tensors):
    """Through the group's backend for the tensors' device; raises where it has none."""
    assert func is torch.ops.c10d.allreduce_.default, f"{func}: make it known here"
    (device,) = {t.device.type for t in tensors}
    backend = dist.ProcessGroup.unbox(args[1])._get_backend(torch.device(device))
    if device == HOST.type:
        return func(*args, **kwargs)
    return args[0], backend.allreduce([t.inner for t in tensors]).boxed()
