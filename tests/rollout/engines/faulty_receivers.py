"""Worker extensions that load weights wrongly, each in one of the ways that the canary is there to catch."""

import torch

from asyncrl.rollout.engines.vllm.receiver import WeightReceiver, load

SKIPPED = "model.layers.1.mlp.down_proj.weight"


class SkipsALayer(WeightReceiver):
    def asyncrl_apply(self, tensors):
        load(self, {name: tensor for name, tensor in tensors.items() if name != SKIPPED})


class KeepsTheOldTiedHead(WeightReceiver):
    def asyncrl_apply(self, tensors):
        self.reload_weights(weights_iterator=iter(tensors.items()))


class LoadsInAnotherDtype(WeightReceiver):
    def asyncrl_apply(self, tensors):
        load(self, {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in tensors.items()})


class SwapsKeysAndValues(WeightReceiver):
    def asyncrl_apply(self, tensors):
        first = "model.layers.0.self_attn."
        keys, values = f"{first}k_proj.weight", f"{first}v_proj.weight"
        load(self, {**tensors, keys: tensors[values], values: tensors[keys]})


class TakesTheShardOfRank0AfterVersion0(WeightReceiver):
    """Of two ranks."""

    loads = 0

    def asyncrl_apply(self, tensors):
        name = SKIPPED
        if self.loads and self.rank == 1:
            half = tensors[name].shape[1] // 2
            tensors = {**tensors, name: tensors[name].roll(half, dims=1)}
        load(self, tensors)
        self.loads += 1


class FailsHalfWay(WeightReceiver):
    def asyncrl_apply(self, tensors):
        names = list(tensors)
        load(self, {name: tensors[name] for name in names[: len(names) // 2]})
        raise RuntimeError("out of memory, say")


class SwapsExpertsAtVersion2(WeightReceiver):
    """The first two of a layer."""

    loads = 0

    def asyncrl_apply(self, tensors):
        if self.loads == 2:
            first = "model.layers.1.block_sparse_moe.experts."
            for part in ("w1", "w2", "w3"):
                own, other = (f"{first}{expert}.{part}.weight" for expert in range(2))
                tensors = {**tensors, own: tensors[other], other: tensors[own]}
        load(self, tensors)
        self.loads += 1
