"""Every family of decoders runs exactly in the embedded engine, and it is known beforehand how."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.engines.torch.probe import exact_decoder, why_by_rows
from asyncrl.rollout.engines.torch.row_decoder import RowDecoder
from asyncrl.weights.source import untied

MAX_LENGTH = 56
PAGE = Path(__file__).parents[3] / "docs/models.md"
TABLE = dict(re.findall(r"^\|[^|]*\| `(\w+)` \|.*\| (batched|by rows) \|$", PAGE.read_text(), re.M))
"""How the embedded engine decodes each family, by the documentation."""


pytestmark = pytest.mark.usefixtures("one_thread")


def requests() -> list[GenerationRequest]:
    """Of unlike lengths, past every window, two of them with equal prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, length).astype(np.int32) for length in (1, 6, 13, 21)]
    return [
        GenerationRequest(str(i), prompt, SamplingParams(12 + i, seed=i))
        for i, prompt in enumerate([*prompts, prompts[2]])
    ]


def generate(engine: TorchEngine, fresh: dict[str, torch.Tensor], swap_after: int):
    """Requests with their chunks, and a next turn of each; after so many tokens, version 1 with its `fresh`
    weights comes."""

    async def answers(requests):
        streams = [asyncio.ensure_future(anext(engine.generate(r))) for r in requests]
        while engine.stats().running + engine.stats().waiting:
            if engine.stats().version == 0 and engine.stats().generated_tokens >= swap_after:
                engine.swap(fresh, 1)
            engine.step()
            await asyncio.sleep(0)
        return list(zip(requests, await asyncio.gather(*streams), strict=True))

    async def scenario():
        first = await answers(requests())
        return first, await answers([next_turn(*answer) for answer in first])

    return asyncio.run(scenario())


def next_turn(request, chunk) -> GenerationRequest:
    shown = np.arange(2, 2 + len(request.prompt_ids) % 5, dtype=np.int32)
    prompt = np.concatenate([request.prompt_ids, chunk.token_ids, shown])
    return GenerationRequest(request.request_id, prompt, SamplingParams(5, seed=int(prompt.sum())))


@torch.no_grad()
def forward_logprobs(model: PreTrainedModel, request: GenerationRequest, tokens: np.ndarray) -> np.ndarray:
    """float32[N]: of the response's tokens, by a plain forward."""
    ids = torch.tensor([*request.prompt_ids.tolist(), *tokens.tolist()])[None]
    logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    start = len(request.prompt_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_exactly(family):
    """In ragged rows with refills, under two versions, and on from there: each token has the log-probability
    that a plain forward of its version gives it."""
    models = [tiny(family, seed) for seed in (0, 1)]
    engine = TorchEngine(tiny(family), capacity=4, spare=1, max_length=MAX_LENGTH, kv_on_update="recompute")
    fresh = {name: tensor.clone() for name, tensor in untied(models[1].state_dict()).items()}
    first, second = generate(engine, fresh, swap_after=20)
    seen = set()
    for request, chunk in first + second:
        assert len(chunk.token_ids) == request.sampling.max_new_tokens
        expected = [forward_logprobs(model, request, chunk.token_ids) for model in models]
        for span in chunk.versions:
            tokens = slice(span.start, span.start + span.length)
            np.testing.assert_allclose(
                chunk.logprobs[tokens], expected[span.version][tokens], rtol=1e-5, atol=1e-5
            )
            seen.add(span.version)
    assert seen == {0, 1}
    turns = [
        (chunk.reused, len(before.prompt_ids)) for (_, chunk), (before, _) in zip(second, first, strict=True)
    ]
    if engine._batch._decoder.keeps_prefixes:
        assert all(reused > prompt for reused, prompt in turns), "answers are kept, too"
    else:
        assert not any(reused for reused, _ in turns)


def test_capped_scores_stay_capped_where_a_model_decodes_by_rows(monkeypatch):
    def refuse(*args, **kwargs):
        raise UnsupportedModelError("no slots today")

    monkeypatch.setattr("asyncrl.rollout.engines.torch.probe.SlotDecoder", refuse)
    model = tiny("gemma2")
    model.set_attn_implementation("sdpa")
    decoder = exact_decoder(model, 2, MAX_LENGTH)
    assert isinstance(decoder, RowDecoder)
    tokens = np.arange(2, 22)
    decoder.fill(np.array([0]), tokens[None, :-1], np.array([19]))
    logits = decoder.decode(tokens[-1:], np.array([19]))
    with torch.no_grad():
        expected = tiny("gemma2")(torch.from_numpy(tokens)[None], use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_lack_of_memory_is_no_reason_to_decode_by_rows(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("asyncrl.rollout.engines.torch.probe.SlotDecoder.decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        exact_decoder(tiny("qwen3"), 2, MAX_LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_known_without_weights_how_a_family_decodes(family):
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(tiny_config(family))
    by_rows = isinstance(exact_decoder(tiny(family), 2, MAX_LENGTH), RowDecoder)
    assert (why_by_rows(shell) is not None) == by_rows
    assert TABLE[family] == ("by rows" if by_rows else "batched")
