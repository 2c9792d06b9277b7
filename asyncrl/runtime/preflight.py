"""Everything that can be found wrong with a run before its first process starts, and what it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.data.load import count_rows, load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.data.rows import is_on_hub
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.runtime import checks, gpu_checks, hub, pace
from asyncrl.runtime.cores import with_own_cores
from asyncrl.runtime.earlier_run import with_trained_models
from asyncrl.runtime.findings import Findings
from asyncrl.runtime.machine import Machine, probe
from asyncrl.runtime.model_facts import ModelFacts, NotFetchedError
from asyncrl.runtime.models import KnownModels, look_for_models
from asyncrl.runtime.outline import Outline, outline
from asyncrl.runtime.resources import Placement, assign, too_few_gpus, wanted_gpus
from asyncrl.runtime.reward_facts import check_pairs
from asyncrl.runtime.user_files import with_absolute_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    folders: Mapping[str, str]
    """Of the models of the hub, by their names (`hub.with_folders`)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config implies, as far as this machine knows."""

    config: Config
    machine: Machine
    """This one, with the GPUs that are planned for."""
    gpus_here: int
    is_elsewhere: bool
    """Whether the plan is for GPUs that this machine does not have."""
    placement: Placement
    outline: Outline
    prompts: PromptSet | None
    models: KnownModels
    missing: tuple[NotHereError, ...]
    """What a run needs and this machine lacks."""
    stops: tuple[str, ...] | None
    """The tokens that end a response, each with what names it; None where the model is not here, or nobody
    asks."""
    warnings: tuple[str, ...]


def preflight(config: Config, gpus: int | None = None) -> Prepared:
    """Check the run against this machine and prepare it; fetches models and datasets of the hub, loads no
    weights, starts and writes nothing.

    `gpus`: how many GPUs to use, None for as many as are of use. Raises `ConfigError` with all that the
    independent checks found wrong, each with its key, value and remedy; with what is only missing on this
    machine, in at most five lines.
    """
    found, folders = _look(with_trained_models(config), gpus, probe(), needs_all=True)
    assert found.prompts is not None
    assert found.models.policy is not None
    return Prepared(
        with_absolute_paths(found.config),
        found.prompts,
        found.models.policy,
        found.machine,
        found.placement,
        found.outline,
        found.warnings,
        folders,
    )


def plan(config: Config, gpus: int | None = None) -> Plan:
    """As `preflight`, but what is not on this machine is listed instead of refused, and nothing is fetched.

    `gpus` may be more than there are, and None takes as many as the config cannot do without: the plan is
    then for a machine that has them, of 80 GB each.
    """
    machine = probe()
    config = with_trained_models(config)
    planned, _ = _look(config, _gpus_to_plan(config, gpus, machine.gpus), machine, needs_all=False)
    return planned


def _gpus_to_plan(config: Config, asked: int | None, available: int) -> int | None:
    if asked is not None:
        return asked
    try:
        checks.budget(config, assign(config, None, available))
    except ConfigError:
        return wanted_gpus(config) or None
    return None


def _look(
    config: Config, gpus: int | None, here: Machine, *, needs_all: bool
) -> tuple[Plan, Mapping[str, str]]:
    """Check what can be checked, in two rounds: what is independent, then what builds on it. Each round's
    messages come at once. needs_all: whether what is missing is refused, or fetched. The folders are those of
    the hub's models, by name."""
    findings = Findings()
    is_elsewhere = gpus is not None and gpus > here.gpus
    machine = here.with_planned_gpus(gpus or 0) if is_elsewhere else here
    if is_elsewhere:
        findings.missing.append(too_few_gpus(gpus or 0, here.gpus))
    else:
        findings.of(lambda: checks.run_dir(config))
        findings.of(lambda: checks.network(config))
    placement = findings.of(lambda: assign(config, gpus, machine.gpus))
    functions = findings.of(lambda: checks.reward_functions(config))
    findings.of(lambda: checks.role_host(config))
    findings.of(lambda: checks.episode(config))
    findings.of(lambda: checks.objective(config))
    findings.of(lambda: checks.trainer(config))
    has_rows = findings.of(lambda: checks.dataset(config))
    if placement is not None:
        findings.of(partial(checks.engine, config, placement))
        findings.of(partial(checks.attention, config, placement))
        findings.of(partial(checks.budget, config, placement))
    models, tokenizer = look_for_models(config, findings)
    to_fetch = needs_all and findings.forget(NotFetchedError)
    findings.refuse(missing_too=needs_all)
    assert placement is not None
    placement = with_own_cores(config, placement, machine.own_cores)

    folders = _fetch(config, findings) if needs_all else {}
    if to_fetch:
        models, tokenizer = look_for_models(config, findings)
    findings.of(lambda: checks.tensor_parallel(config, models.policy))
    decoding = findings.of(lambda: checks.decoding(config, models.policy))
    if not is_elsewhere:
        findings.of(lambda: checks.shared_memory(config, models.policy, machine))
        findings.of(lambda: checks.visible_gpus(config, placement))
    prompts = rows = None
    if has_rows and is_on_hub(config.data) and not needs_all:
        findings.missing.append(_unread(config))
    elif has_rows:
        prompts, rows = _prompts(config, tokenizer, findings)
    findings.refuse(missing_too=needs_all)

    longest = mean = None
    if prompts is not None:
        longest = prompts.longest_tokens
        checks.reward_routes(config, functions, prompts)
        check_pairs(config, models.reward, prompts)
        checks.prompts_fit(config, models.policy, prompts)
        if needs_all:
            checks.servers(config, prompts)
        mean = sum(len(row.prompt_ids) for row in prompts) / len(prompts)
    implied = outline(config, placement, models, rows, longest, machine.gpu_bytes, mean_prompt_tokens=mean)
    gpu_checks.shares(config, implied)
    warnings = [*gpu_checks.warnings(config, placement, implied), *checks.warnings(config, implied)]
    if decoding is not None:
        warnings.append(decoding)
    if implied.paces:
        warnings += pace.warnings(config, implied.paces[-1])
    if prompts is not None and tokenizer is not None:
        warnings += checks.prompt_warnings(config, prompts, tokenizer)
    if not is_elsewhere:
        warnings += checks.machine_warnings(machine, implied)
    planned = Plan(
        config=config,
        machine=machine,
        gpus_here=here.gpus,
        is_elsewhere=is_elsewhere,
        placement=placement,
        outline=implied,
        prompts=prompts,
        models=models,
        missing=tuple(findings.missing),
        stops=None if needs_all or tokenizer is None else _stops(config, tokenizer),
        warnings=tuple(warnings),
    )
    return planned, folders


def _stops(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    from asyncrl.rollout.stops import stop_tokens  # imports transformers

    found = stop_tokens(config.model)
    for token_id in config.rollout.stop_token_ids:
        found.setdefault(token_id, []).append("rollout.stop_token_ids")
    return tuple(
        f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id}: {', '.join(sources)})"
        for token_id, sources in sorted(found.items())
    )


def _fetch(config: Config, findings: Findings) -> dict[str, str]:
    """The folders of the hub's models, fetched where they are not here."""
    found = {name: findings.of(partial(hub.fetch, key, name, code)) for key, name, code in hub.names(config)}
    findings.refuse(missing_too=True)
    return {name: str(folder) for name, folder in found.items()}


def _unread(config: Config) -> NotHereError:
    return NotHereError(
        f"data.path={config.data.path}: its rows are not known before it is fetched",
        command="a run fetches it at its start",
    )


def _prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, findings: Findings
) -> tuple[PromptSet | None, int | None]:
    """The prompts to train on, if they can be tokenised, and how many there are, if the rows can be read."""
    if tokenizer is None:
        return None, findings.of(lambda: checks.enough_rows(config, count_rows(config.data)))
    prompts = findings.of(lambda: load_prompts(config.data, tokenizer))
    if prompts is None or findings.of(lambda: checks.enough_rows(config, len(prompts))) is None:
        return None, None
    trained, _ = prompts.split(config.data.held_out_rows)
    return trained, len(trained)
