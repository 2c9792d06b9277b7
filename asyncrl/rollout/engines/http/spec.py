"""Running vLLM servers that somebody else operates."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.config.servers import impossible_key_env, impossible_urls
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.packages import need
from asyncrl.paths import check_can_be_written, user_path
from asyncrl.rollout.engines.spec import Card, Device, Parts
from asyncrl.rollout.engines.vllm import families
from asyncrl.rollout.engines.vllm.spec import OfVllm
from asyncrl.section import with_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from asyncrl.rollout.engines.http.engine import HttpEngine

FOR_EVALUATION = "evaluation"
"""In the folder of weights, that of the servers that score versions."""


class Http(OfVllm):
    computes_here = False
    why_no_sleep = "with {} the servers' memory is not its own to give"

    def make(self, config: Config, longest_prompt_tokens: int, *, shares_gpu: bool = False) -> HttpEngine:
        from asyncrl.data.stops import stop_token_ids
        from asyncrl.rollout.engines.http.engine import HttpEngine
        from asyncrl.rollout.engines.http.fleet import Deadlines
        from asyncrl.rollout.engines.http.weights_dir import WeightsDir
        from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights

        c, model, http = config.rollout, config.model, config.rollout.http
        return HttpEngine(
            http.urls,
            WeightsDir(Path(http.weights_dir)),
            ExpectedWeights(model.path, model.dtype, model.trust_remote_code),
            dtype=model.dtype,
            capacity=c.slots,
            max_length=c.context_tokens(longest_prompt_tokens),
            group_size=c.sampled,
            kv_on_update=c.kv_on_update,
            stop_token_ids=stop_token_ids(model),
            api_key=None if http.api_key_env is None else os.environ[http.api_key_env],
            deadlines=Deadlines(
                http.answer_timeout_s, http.load_timeout_s, http.stall_timeout_s, http.patience_s
            ),
        )

    def for_evaluation(self, config: Config) -> Config:
        http = config.rollout.http
        if not http.evaluation_urls:
            raise ConfigError(
                "evaluation scores a version by an engine of its own, and the servers of rollout.http.urls "
                "take every new one; name others in rollout.http.evaluation_urls, or score checkpoints with "
                "`asyncrl eval`"
            )
        folder = str(Path(http.weights_dir or "") / FOR_EVALUATION)
        own = {"rollout.http.urls": http.evaluation_urls, "rollout.http.weights_dir": folder}
        return with_values(config, own | {"rollout.http.evaluation_urls": []})

    def check_device(self, config: Config, device: Device) -> None:
        need("aiohttp", f"rollout.engine={config.rollout.engine}")

    def check_machine(self, config: Config) -> None:
        """The folder by which servers get weights can be written."""
        if (folder := config.rollout.http.weights_dir) is not None:
            called = f"rollout.http.weights_dir={folder}"
            check_can_be_written(user_path(folder, called), called)

    def check_servers(self, config: Config, structure: PreTrainedConfig, longest_prompt_tokens: int) -> None:
        from asyncrl.rollout.engines.http.facts import Needs
        from asyncrl.rollout.engines.http.probe import unusable

        http = config.rollout.http
        if http.api_key_env is not None and not os.environ.get(http.api_key_env):
            raise ConfigError(
                f"rollout.http.api_key_env={http.api_key_env}: there is no such environment variable; put "
                "the servers' API key into it"
            )
        key = os.environ[http.api_key_env] if http.api_key_env else None
        needs = Needs(
            config.model.dtype,
            config.rollout.context_tokens(longest_prompt_tokens),
            families.has_experts(structure),
        )
        ask = partial(unusable, answer_timeout_s=http.answer_timeout_s, load_timeout_s=http.load_timeout_s)
        with ThreadPoolExecutor(1) as thread:  # this one may have an event loop already
            problems = thread.submit(ask, [*http.urls, *http.evaluation_urls], needs, key).result()
        if problems:
            raise ConfigError("\n".join(f"rollout.http: {problem}" for problem in problems))

    def memory(
        self, config: Config, model: ModelFacts | None, sequence_tokens: int, card: Card | None
    ) -> tuple[Parts, Parts] | None:
        """That of the servers is their operators' business."""
        if model is None:
            return None
        return {"incoming weights": model.parameters * DTYPE_BYTES[config.model.dtype]}, {}

    def sweep(self, config: Config) -> None:
        from asyncrl.rollout.engines.http.weights_dir import sweep

        folder = Path(config.rollout.http.weights_dir)
        for each in folder, folder / FOR_EVALUATION:
            sweep(each)

    def impossible(self, config: Config) -> Iterator[str]:
        yield from super().impossible(config)
        http = config.rollout.http
        if not http.urls:
            yield "rollout.engine=http has no servers; name them in rollout.http.urls=[http://HOST:PORT, ...]"
        named = {"urls": http.urls, "evaluation_urls": http.evaluation_urls}
        for name, urls in named.items():
            yield from impossible_urls(f"rollout.http.{name}", urls, "http://HOST:PORT")
        for url, count in Counter(url.rstrip("/").lower() for urls in named.values() for url in urls).items():
            if count > 1:
                yield f"rollout.http names {url} {count} times; name each server once"
        if http.evaluation_urls and config.evaluation is not None and config.evaluation.workers > 1:
            yield (
                f"evaluation.workers={config.evaluation.workers}: one process drives all of "
                "rollout.http.evaluation_urls; use evaluation.workers=1"
            )
        if http.weights_dir is None or not Path(http.weights_dir).is_absolute():
            yield (
                f"rollout.http.weights_dir={http.weights_dir or 'null'}: name a folder, by its absolute "
                "path, that this machine and all servers see; on one host, for instance /dev/shm/asyncrl"
            )
        yield from impossible_key_env("rollout.http.api_key_env", http.api_key_env)
        if http.load_timeout_s >= config.weights.ack_timeout_s:
            yield (
                f"rollout.http.load_timeout_s={http.load_timeout_s:g} is not below weights.ack_timeout_s="
                f"{config.weights.ack_timeout_s:g}: one slow server would end the run; raise "
                "weights.ack_timeout_s"
            )
        if config.rollout.kept_contexts is not None:
            yield (
                f"rollout.kept_contexts={config.rollout.kept_contexts}: with rollout.engine=http the servers "
                "keep what they have room for, by their own options; leave it null"
            )
        for key, count, one in ("workers", config.rollout.workers, 1), ("guests", config.rollout.guests, 0):
            if count > one:
                yield (
                    f"rollout.{key}={count}: with rollout.engine=http one worker drives all servers; use "
                    f"rollout.{key}={one}"
                )


SPEC = Http()
