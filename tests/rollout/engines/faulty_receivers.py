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


class FailsHalfWay(WeightReceiver):
    def asyncrl_apply(self, tensors):
        names = list(tensors)
        load(self, {name: tensors[name] for name in names[: len(names) // 2]})
        raise RuntimeError("out of memory, say")
