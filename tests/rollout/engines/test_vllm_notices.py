"""Weight versions as vLLM's processes reach them."""

import asyncio

import torch

from asyncrl.rollout.engines.vllm.notices import reachable
from asyncrl.weights.canary import Canary
from asyncrl.weights.source import LocalWeights

NEWER = Canary((1, 2), (-0.5,), "float32")


class Overtaken(LocalWeights):
    """Of which another host has a newer version by the time that it is read."""

    def tensors(self):
        self.version, self.canary = 7, NEWER
        return {"w": torch.full((3,), 7.0)}


def test_a_copy_has_the_number_and_the_canary_of_the_version_that_it_is_of():
    async def check():
        async with reachable(Overtaken(5, {})) as version:
            assert (version.notice.version, version.notice.canary) == (7, NEWER)
            assert version.source().tensors()["w"].tolist() == [7.0] * 3

    asyncio.run(check())
