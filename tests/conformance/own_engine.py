"""A user's own engine, the plainest that there is: one forward over the whole sequence for each token. It is
held against `test_engine.py`, as one of the harnesses, and does whole runs in `test_own_engine.py`."""

import asyncio
import time
from collections import Counter

import numpy as np
import torch
from engine_reference import processed_logprobs
from pydantic import Field
from transformers import AutoModelForCausalLM

from asyncrl.config import Section
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.data.stops import stop_token_ids
from asyncrl.errors import ConfigError
from asyncrl.rollout.engines.base import EngineStats, TokenChunk, UpdateReport
from asyncrl.rollout.engines.spec import EngineSpec
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.weights.source import WeightsError


class PlainSettings(Section):
    side_by_side: int = Field(ge=1)
    """Requests that decode at the same time."""


class Plain:
    """A request, and what has been sampled for it."""

    def __init__(self, request, stops):
        self.request, self.stops = request, stops
        self.ids, self.logprobs, self.versions = [], [], []
        self.uniforms = np.random.default_rng(request.sampling.seed).random(request.sampling.max_new_tokens)

    def chunk(self, reason):
        spans, start = [], 0
        for version, length in Counter(self.versions).items():  # versions only grow
            spans.append(VersionSpan(start, length, version))
            start += length
        ids, logprobs = np.array(self.ids, np.int32), np.array(self.logprobs, np.float32)
        kept = KeptSets.without(self.stops, self.request.sampling.min_new_tokens, len(ids))
        return TokenChunk(ids, logprobs, tuple(spans), reason, kept)


class PlainEngine(StreamingEngine):
    def __init__(self, model, *, capacity, max_length, stop_token_ids=()):
        vocab_size = model.config.get_text_config().vocab_size
        super().__init__(
            capacity=capacity, vocab_size=vocab_size, max_length=max_length, stop_token_ids=stop_token_ids
        )
        self.model, self.version, self.requests, self.generated = model, 0, [], 0

    async def run(self):
        while self._broken is None:
            self.step()
            await (asyncio.sleep(0) if self.requests else self._change())
        raise self._broken

    @torch.inference_mode()
    def step(self):
        self._refuse_broken()
        for plain in self.requests[: self.capacity]:
            ids = torch.tensor([[*plain.request.prompt_ids.tolist(), *plain.ids]])
            logits = self.model(ids, use_cache=False).logits[0, -1]
            sampling = plain.request.sampling
            if len(plain.ids) < sampling.min_new_tokens:
                logits[plain.stops] = -torch.inf
            logprobs = processed_logprobs(logits.float().numpy(), sampling)
            cumulative = np.exp(logprobs).cumsum()
            drawn = np.searchsorted(cumulative, plain.uniforms[len(plain.ids)] * cumulative[-1], side="right")
            token = int(logprobs.argmax() if sampling.temperature == 0 else drawn)
            plain.ids.append(token)
            plain.logprobs.append(logprobs[token])
            plain.versions.append(self.version)
            self.generated += 1
            if token in plain.stops:
                self._end(plain, FinishReason.STOP)
            elif len(plain.ids) == sampling.max_new_tokens:
                self._end(plain, FinishReason.LENGTH)

    def abort(self, request_id):
        for plain in [p for p in self.requests if p.request.request_id == request_id]:
            self._end(plain, FinishReason.ABORT)

    async def update_weights(self, source):
        return UpdateReport(source.version, 0.0, self.swap(source.tensors(), source.version))

    def swap(self, tensors, version):
        started = time.perf_counter()
        own = self.model.state_dict()
        for name, tensor in tensors.items():
            if name not in own or (own[name].shape, own[name].dtype) != (tensor.shape, tensor.dtype):
                raise WeightsError(f"{name}: {tensor.dtype}{list(tensor.shape)} does not fit the model")
        if lacking := {key for key, _ in self.model.named_parameters()} - set(tensors):
            raise WeightsError(f"{', '.join(sorted(lacking))} missing")
        self.model.load_state_dict(tensors, strict=False)
        self.version = version
        return time.perf_counter() - started

    def stats(self):
        running = min(len(self.requests), self.capacity)
        waiting = len(self.requests) - running
        return EngineStats(self.version, running, waiting, self.generated, self._busy_so_far_s())

    def _submit(self, request):
        self.requests.append(Plain(request, self._stop_ids(request)))

    def _has_requests(self):
        return bool(self.requests)

    def _end(self, plain, reason):
        self.requests.remove(plain)
        self._streams.end(plain.request.request_id, plain.chunk(reason))
        self._mark_busy()


class PlainSpec(EngineSpec):
    settings = PlainSettings
    is_stepped = True

    def make(self, config, longest_prompt_tokens, *, shares_gpu):
        return PlainEngine(
            AutoModelForCausalLM.from_pretrained(config.model.path),
            capacity=PlainSettings.model_validate(config.rollout.settings).side_by_side,
            max_length=config.rollout.context_tokens(longest_prompt_tokens),
            stop_token_ids=stop_token_ids(config.model),
        )

    def check_device(self, config, device):
        if device != "cpu":
            raise ConfigError("the plain engine computes on the CPU; use rollout.device=cpu")

    def impossible(self, config):
        yield from super().impossible(config)
        if config.rollout.kv_on_update == "keep":
            yield "rollout.kv_on_update=keep: nothing is kept; use rollout.kv_on_update=recompute"


SPEC = PlainSpec()
