"""The prompts of a run, read by a process of their own while its models are looked at: on a small model each
takes about as long as the other, and both come before everything else."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from asyncrl.config import Config, DataConfig
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.data.rows import is_on_hub
from asyncrl.lifeline import die_with
from asyncrl.plan.facts.model import find_policy, find_tokenizer
from asyncrl.plan.preflight import LoadPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def reading_beside(config: Config) -> Iterator[LoadPrompts]:
    """`load_prompts`, which has begun with the run's own dataset. Of a process with one thread, which this
    forks."""
    # What has to be fetched is not, before the rest is sound; a model's own code runs once.
    if is_on_hub(config.data) or config.model.trust_remote_code:
        yield load_prompts
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork, die_with, (os.getpid(),)) as beside:
        encoded = beside.submit(_encoded, config)

        def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
            if data == config.data:
                with suppress(Exception):  # it comes again here, where it is told
                    return PromptSet.decoded(encoded.result())
            return load_prompts(data, tokenizer)

        yield load


def _encoded(config: Config) -> bytes:
    return load_prompts(config.data, find_tokenizer(find_policy(config.model))).encoded()
