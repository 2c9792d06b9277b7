"""Mixtures of experts, and an output head with a bias, in a real vLLM: from version to version they compute
what the trainer computes, and all of it is proven."""

import asyncio

import numpy as np
import pytest
import torch
from families import tiny_config
from test_vllm_weights import DEADLINE_S, _receivers_can_be_found  # noqa: F401
from transformers import AutoModelForCausalLM

from asyncrl.weights.canary import CanaryError, make_canary
from asyncrl.weights.source import LocalWeights

pytestmark = pytest.mark.vllm

WIDE = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32, "tie_word_embeddings": False}
"""As vLLM's CPU kernels ask for."""


def model(family: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(family)
    for name, value in WIDE.items():
        setattr(config, name, value)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("family", ["mixtral", "phi"])
def test_versions_of_families_that_vllm_knows_by_other_names(family, tmp_path):
    """Two experts of a layer are swapped at version 2: each of their tensors is named."""
    import imported_vllm  # noqa: F401

    from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
    from asyncrl.rollout.engines.vllm.engine import VllmEngine
    from asyncrl.rollout.engines.vllm.generation import score
    from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch

    models = [model(family, seed) for seed in range(3)]
    models[0].config.architectures = [type(models[0]).__name__]
    models[0].config.save_pretrained(tmp_path)
    text = np.random.default_rng(0).integers(2, 97, 100).tolist()

    async def scenario():
        limits = {"capacity": 4, "max_length": 128}
        receiver = "faulty_receivers.SwapsExpertsAtVersion2"
        llm = launch(LaunchSettings(str(tmp_path), "float32", receiver=receiver, **limits))
        engine = VllmEngine(llm, ExpectedWeights(str(tmp_path), "float32"), **limits)
        try:
            for version in range(2):
                canary = make_canary(models[version], text)
                await engine.update_weights(LocalWeights(version, models[version].state_dict(), canary))
                assert not engine._unknown, "a tensor that nothing compares"
                np.testing.assert_allclose(await score(llm, canary.token_ids), canary.logprobs, atol=1e-4)
            if family == "mixtral":
                with pytest.raises(CanaryError, match=r" 6 of its tensors .*experts\.0\.w1\.weight, .*"):
                    await engine.update_weights(LocalWeights(2, models[2].state_dict(), canary))
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))
