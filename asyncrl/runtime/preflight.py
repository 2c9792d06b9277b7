"""Everything that can be found wrong with a run before its first process starts, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.data.load import count_rows, load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.runtime import checks, gpu_checks, pace
from asyncrl.runtime.cores import with_own_cores
from asyncrl.runtime.earlier_run import with_trained_models
from asyncrl.runtime.findings import Findings
from asyncrl.runtime.machine import Machine, probe
from asyncrl.runtime.model_facts import ModelFacts
from asyncrl.runtime.models import KnownModels, look_for_models
from asyncrl.runtime.outline import Outline, outline
from asyncrl.runtime.resources import Placement, assign
from asyncrl.runtime.reward_facts import check_pairs

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
    missing: tuple[str, ...]
    """What a run needs and this machine lacks, one message each."""
    warnings: tuple[str, ...]


def preflight(config: Config, gpus: int | None = None) -> Prepared:
    """Check the run against this machine and prepare it; loads no weights, starts and writes nothing.

    `gpus`: how many GPUs to use, None for as many as are of use. Raises `ConfigError` with all that the
    independent checks found wrong, each with its key, value and remedy.
    """
    found = _look(with_trained_models(config), gpus, probe(), is_elsewhere=False, needs_all=True)
    assert found.prompts is not None
    assert found.models.policy is not None
    return Prepared(
        found.config,
        found.prompts,
        found.models.policy,
        found.machine,
        found.placement,
        found.outline,
        found.warnings,
    )


def plan(config: Config, gpus: int | None = None) -> Plan:
    """As `preflight`, but what is not on this machine is listed instead of refused, and `gpus` may be more
    than there are: the plan is then for a machine that has them, of 80 GB each."""
    machine = probe()
    is_elsewhere = gpus is not None and gpus > machine.gpus
    return _look(with_trained_models(config), gpus, machine, is_elsewhere=is_elsewhere, needs_all=False)


def _look(config: Config, gpus: int | None, here: Machine, *, is_elsewhere: bool, needs_all: bool) -> Plan:
    """Check what can be checked, in two rounds: what is independent, then what builds on it. Each round's
    messages come at once. needs_all: whether what is missing is refused, too."""
    machine = here.with_planned_gpus(gpus or 0) if is_elsewhere else here
    findings = Findings()
    if not is_elsewhere:
        findings.of(lambda: checks.run_dir(config))
        findings.of(lambda: checks.network(config))
    placement = findings.of(lambda: assign(config, gpus, machine.gpus))
    functions = findings.of(lambda: checks.reward_functions(config))
    findings.of(lambda: checks.objective(config))
    models, tokenizer = look_for_models(config, findings)
    findings.refuse(missing_too=needs_all)
    assert placement is not None
    placement = with_own_cores(config, placement, machine.own_cores)

    findings.of(lambda: checks.engine(config, placement))
    findings.of(lambda: checks.trainer(config))
    findings.of(lambda: checks.attention(config, placement))
    findings.of(lambda: checks.budget(config, placement))
    if not is_elsewhere:
        findings.of(lambda: checks.shared_memory(config, models.policy, machine))
    prompts, rows = _prompts(config, tokenizer, findings)
    findings.refuse(missing_too=needs_all)

    longest = None
    if prompts is not None:
        longest = prompts.longest_tokens
        checks.reward_routes(config, functions, prompts)
        check_pairs(config, models.reward, prompts)
        checks.prompts_fit(config, models.policy, prompts)
        if needs_all:
            checks.servers(config, prompts)
    implied = outline(config, placement, models, rows, longest, machine.gpu_bytes)
    gpu_checks.shares(config, implied)
    warnings = [*gpu_checks.warnings(config, placement, implied), *checks.warnings(config, implied)]
    expected = pace.predict(config, models, placement, config.rollout.max_new_tokens)
    warnings += pace.warnings(config, expected) if expected is not None else []
    if prompts is not None and tokenizer is not None:
        warnings += checks.prompt_warnings(config, prompts, tokenizer)
    if not is_elsewhere:
        warnings += checks.machine_warnings(machine, implied)
    return Plan(
        config=config,
        machine=machine,
        gpus_here=here.gpus,
        is_elsewhere=is_elsewhere,
        placement=placement,
        outline=implied,
        prompts=prompts,
        models=models,
        missing=tuple(findings.missing),
        warnings=tuple(warnings),
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
