"""Everything that can be found wrong with a run before its first process starts, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.config import Config
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.errors import ConfigError
from asyncrl.runtime import checks
from asyncrl.runtime.model_facts import ModelFacts, inspect_model
from asyncrl.runtime.outline import Outline, outline
from asyncrl.runtime.resources import Machine, Placement, assign, probe
from asyncrl.runtime.reward_facts import check_pairs, inspect_reward_models


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can start."""

    config: Config
    prompts: PromptSet
    model: ModelFacts
    machine: Machine
    placement: Placement
    outline: Outline
    warnings: tuple[str, ...]
    """What works but may surprise, one sentence each."""


def preflight(config: Config, gpus: int | None = None) -> Prepared:
    """Check the run against this machine and prepare it; loads no weights, starts and writes nothing.

    `gpus`: how many GPUs to use, None for as many as are of use. Raises `ConfigError` with all that the
    independent checks found wrong, each with its key, value and remedy.
    """
    machine = probe()
    _, placement, functions, _, (model, tokenizer), reward_models = _all_of(
        lambda: checks.run_dir(config),
        lambda: assign(config, gpus, machine.gpus),
        lambda: checks.reward_functions(config),
        lambda: checks.objective(config),
        lambda: inspect_model(config.model),
        lambda: inspect_reward_models(config),
    )
    checks.engine(config, placement)
    checks.attention(config, placement)
    checks.budget(config, placement)
    checks.shared_memory(config, model, machine)
    prompts, _ = checks.enough_rows(config, load_prompts(config.data, tokenizer)).split(
        config.data.held_out_rows
    )
    checks.reward_routes(config, functions, prompts)
    check_pairs(config, reward_models, prompts)
    checks.prompts_fit(config, model, prompts)
    implied = outline(config, placement, model, len(prompts), prompts.longest_tokens, reward_models)
    warnings = checks.warnings(config, machine, placement, implied, prompts, tokenizer.eos_token_id)
    return Prepared(config, prompts, model, machine, placement, implied, tuple(warnings))


def _all_of(*independent: Callable[[], Any]) -> list[Any]:
    """The results of all checks, or one `ConfigError` with the messages of all that failed."""
    results, messages = [], []
    for check in independent:
        try:
            results.append(check())
        except ConfigError as error:
            messages.append(str(error))
    if messages:
        raise ConfigError("\n".join(messages))
    return results
