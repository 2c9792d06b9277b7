"""The end of a weight update inside vLLM's own processes: a worker extension, whose methods vLLM's
`collective_rpc` calls in every worker (one per rank of tensor parallelism)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from asyncrl.lifeline import die_with
from asyncrl.rollout.engines.vllm import experts
from asyncrl.rollout.engines.vllm.notices import Reachable
from asyncrl.rollout.engines.vllm.proof import FIRST_PROBE_FLOPS, PROBE_FLOPS, Proof, prove
from asyncrl.weights.blocks import spare_threads
from asyncrl.weights.checkpoint_names import CheckpointTensor, as_checkpoint
from asyncrl.weights.source import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Staging(threading.Thread):
    """Reads a version out of shared memory, or receives it, beside the decoding: all that takes time releases
    the GIL. `device`: the model's."""

    def __init__(self, version: Reachable, device: torch.device) -> None:
        super().__init__(name="weights", daemon=True)
        self.version = version.notice.version
        self.tensors: Mapping[str, Tensor] = {}
        self.refusal: str | None = None
        self._weights = version.source()
        self._weights.threads = staging_threads()
        self._device = device

    def run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own
        try:
            self.tensors = self._weights.borrowed()
        except WeightsError as error:
            self.refusal = str(error)
        except Exception as error:  # noqa: BLE001 - the engine hears of it, which this thread's end would hide
            self.refusal = f"{type(error).__name__}: {error}"

    def give_back(self) -> None:
        """What was read has been loaded. Raises `WeightsError` where it has changed meanwhile."""
        self.tensors = {}
        self._weights.give_back()


def staging_threads() -> int:
    """Where a GPU decodes, cores are idle; a CPU decodes with its own."""
    return spare_threads() if torch.cuda.is_initialized() else 1


class WeightReceiver:
    """Mixed into vLLM's worker class. Its names must not be among the worker's own, hence the prefix."""

    asyncrl_staging: Staging | None = None
    asyncrl_proven = False
    asyncrl_checkpoint: tuple[CheckpointTensor, ...] = ()
    reload_weights: Any
    model_runner: Any

    def asyncrl_begin(self, parent: int, checkpoint: bytes) -> None:
        """End with the process `parent`, if that has started this one. `checkpoint`: the encoded
        `CheckpointTensor`s that are to be loaded of every version."""
        if os.getppid() == parent:
            die_with(parent)
        self.asyncrl_checkpoint = msgspec.msgpack.decode(checkpoint, type=tuple[CheckpointTensor, ...])

    def asyncrl_stage(self, version: bytes) -> None:
        """Begin to read the version of an encoded `Reachable`. What was staged before is forgotten."""
        device = next(self.model_runner.get_model().parameters()).device
        self.asyncrl_staging = Staging(msgspec.msgpack.decode(version, type=Reachable), device)
        self.asyncrl_staging.start()

    def asyncrl_staged(self) -> dict[str, Any]:
        """{"done": whether the reading has ended, "refusal": why nothing may be loaded, or None}."""
        staging = self.asyncrl_staging
        assert staging is not None
        return {"done": not staging.is_alive(), "refusal": staging.refusal}

    def asyncrl_load(self, version: int, prove_it: bool) -> dict[str, Any]:
        """Load the staged version into the model. The scheduler must be paused.

        Returns what `Proof` has, of a comparison of what the model holds then with the version: {"wrong",
        "unknown"}, empty unless `prove_it`.
        """
        staging, self.asyncrl_staging = self.asyncrl_staging, None
        if staging is None or staging.is_alive() or staging.refusal or staging.version != version:
            raise RuntimeError(f"weight version {version} is not staged")
        # It warns, at every load, of modules that have no weights, or tied ones.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        tensors = as_checkpoint(staging.tensors, self.asyncrl_checkpoint)
        self.asyncrl_apply(tensors)
        proof = Proof()
        if prove_it:
            flops = PROBE_FLOPS if self.asyncrl_proven else FIRST_PROBE_FLOPS
            proof = prove(self.model_runner.get_model(), tensors, flops, seed=version)
            self.asyncrl_proven = True
        staging.give_back()
        return {"wrong": proof.wrong, "unknown": proof.unknown}

    def asyncrl_apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Make `tensors` the model's weights."""
        load(self, tensors)


def load(worker: WeightReceiver, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors through vLLM's own reloading, which fuses and splits them."""
    model = worker.model_runner.get_model()
    add_head_biases(model, tensors)
    with experts.packed_anew(model):
        worker.reload_weights(weights_iterator=iter(tensors.items()))
    repack_tied_heads(model)


def add_head_biases(model: nn.Module, checkpoint: Container[str]) -> None:
    """Give every output head the bias that the checkpoint has for it.

    Where vLLM computes with transformers' own layers, it makes a head's bias when it loads one, and a reload
    leaves each layer with the parameters that it had before: none came with the random weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for path, head in model.named_modules():
        if isinstance(head, ParallelLMHead) and head.bias is None and f"{path}.bias" in checkpoint:
            with head.weight.device:
                head._register_bias()


def repack_tied_heads(model: nn.Module) -> None:
    """Give every output head that is tied to the embeddings the new weights.

    vLLM's CPU build keeps a packed copy of the weights in each linear layer. A reload renews it for the
    layers that tensors were loaded into; a tied head gets none of its own, and would go on with the old copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
    }
    for head in model.modules():
        if isinstance(head, ParallelLMHead) and id(head.weight) in embeddings and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
