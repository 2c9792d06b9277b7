"""The embedded engine: continuous batching over any Hugging Face decoder-only model."""

from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.engines.torch.model import build_model

__all__ = ["TorchEngine", "UnsupportedModelError", "build_model"]
