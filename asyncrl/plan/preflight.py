"""Everything that can be found wrong with a run before its first process starts, and what it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.curriculum.hints import with_hints
from asyncrl.data import hub
from asyncrl.data.load import count_rows, load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.data.rows import is_on_hub, told
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.evaluation.sets import by_scorer, scored
from asyncrl.evaluation.suites import scoring
from asyncrl.plan import disk, pace
from asyncrl.plan.checks import gpu as gpu_checks
from asyncrl.plan.checks import settings as checks
from asyncrl.plan.facts.model import NotFetchedError
from asyncrl.plan.facts.models import KnownModels, look_for_models
from asyncrl.plan.facts.reward import check_pairs
from asyncrl.plan.findings import Findings
from asyncrl.plan.machine import Machine, Nodes, probe
from asyncrl.plan.outline import Outline, outline
from asyncrl.plan.resources import Placement, assign, too_few_gpus, wanted_gpus, with_own_cores
from asyncrl.reward.judges.judge import check as check_judge
from asyncrl.reward.thinking import thinking_of
from asyncrl.roles import TRAINER
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.runfiles.earlier_run import with_trained_models
from asyncrl.runfiles.user_code import Found
from asyncrl.runfiles.user_files import UserFiles, look_at_functions, with_absolute_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_NODE = Nodes()


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
    held_out: PromptSet | None
    """What is evaluated on."""
    models: KnownModels
    missing: tuple[NotHereError, ...]
    """What a run needs and this machine lacks."""
    stops: tuple[str, ...] | None
    """The tokens that end a response, each with what names it; None where the model is not here, or nobody
    asks."""
    warnings: tuple[str, ...]
    """What works but may surprise, one sentence each."""
    user_files: UserFiles
    folders: Mapping[str, str]
    """Of the models of the hub, by their names (`hub.with_folders`), where they have been fetched."""


def preflight(
    config: Config, gpus: int | None = None, functions: Found | None = None, nodes: Nodes = ONE_NODE
) -> Plan:
    """Check the run against this machine and prepare it; fetches models and datasets of the hub, loads no
    weights, starts and writes nothing.

    `gpus`: how many GPUs to use, None for as many as are of use. `functions`: what has been found of those
    that the config names, if somebody has looked already. `nodes`: machines like this one to spread the run
    over. Raises `ConfigError` with all that the
    checks found wrong, each with its key, value and remedy; with what is only missing on this machine, in at
    most five lines.
    """
    found = _look(config, gpus, probe().over(nodes), functions, nodes, needs_all=True)
    return replace(found, config=with_absolute_paths(found.config))


def plan(config: Config, gpus: int | None = None, nodes: Nodes = ONE_NODE) -> Plan:
    """As `preflight`, but what is not on this machine is listed instead of refused, and nothing is fetched.

    `gpus` may be more than there are, and None takes as many as the config cannot do without: the plan is
    then for a machine that has them, of 80 GB each.
    """
    machine = probe().over(nodes)
    wanted = _gpus_to_plan(config, gpus, machine.gpus)
    if gpus is None and wanted is not None:
        wanted = -(-wanted // nodes.count) * nodes.count
    return _look(config, wanted, machine, None, nodes, needs_all=False)


def lacks(config: Config) -> list[str]:
    """What these settings lack, as far as it can be told where others are wrong."""
    findings = Findings()
    if _independent(config, findings, None, ONE_NODE, is_elsewhere=False).has_rows and not is_on_hub(
        config.data
    ):
        findings.of(partial(count_rows, config.data))
    if (trained := findings.of(lambda: with_trained_models(config))) is not None:
        look_for_models(trained, findings)
    findings.forget(NotFetchedError)
    return [*findings.refusals, *map(str, findings.missing)]


def _gpus_to_plan(config: Config, asked: int | None, available: int) -> int | None:
    if asked is not None:
        return asked
    try:
        checks.budget(config, assign(config, None, available))
    except ConfigError:
        return wanted_gpus(config) or None
    return None


def _look(
    config: Config, gpus: int | None, here: Machine, functions: Found | None, nodes: Nodes, *, needs_all: bool
) -> Plan:
    """Check what can be checked, with everything that is wrong in one message. needs_all: whether what is
    missing is refused, or fetched."""
    findings = Findings()
    is_elsewhere = gpus is not None and gpus > here.gpus
    machine = here.with_planned_gpus(gpus or 0) if is_elsewhere else here
    if is_elsewhere:
        lacking = too_few_gpus(gpus or 0, here.gpus)
        # Who plans for other GPUs needs no advice to do so.
        findings.missing.append(lacking if needs_all else NotHereError(lacking.what, command=lacking.command))
    placement = findings.of(lambda: assign(config, gpus, machine.gpus, nodes.count))
    if placement is not None:
        placement = with_own_cores(config, placement, machine.own_cores)
        findings.of(partial(checks.engine, config, placement))
        findings.of(partial(checks.attention, config, placement))
        findings.of(partial(checks.budget, config, placement))
        findings.of(partial(checks.mapped_gpus, config, placement))
        findings.of(partial(checks.ranks, config, placement))
        if not is_elsewhere:
            findings.of(partial(checks.visible_gpus, config, placement))
    independent = _independent(config, findings, functions, nodes, is_elsewhere=is_elsewhere)
    trained = findings.of(lambda: with_trained_models(config))
    if trained is None:
        findings.refuse(missing_too=False)
    scene = _Scene(trained or config, placement, machine, independent, is_elsewhere, needs_all)
    known = _known(scene, findings, fetches=False)
    to_fetch = needs_all and (findings.forget(NotFetchedError) or _reads_hub(config))
    findings.refuse(missing_too=needs_all)

    folders = _fetch(scene.config, findings) if needs_all else {}
    if to_fetch:
        known = _known(scene, findings, fetches=True)
        findings.refuse(missing_too=True)
    return _plan(scene, known, findings, here.gpus, folders)


@dataclass(frozen=True, slots=True)
class _Independent:
    """What is known without models and placement."""

    functions: Found
    has_rows: bool
    """Whether the dataset is here, or can be fetched."""


def _independent(
    config: Config, findings: Findings, functions: Found | None, nodes: Nodes, *, is_elsewhere: bool
) -> _Independent:
    if not is_elsewhere:
        findings.of(lambda: disk.run_dir(config))
        findings.of(lambda: engine_of(config).check_machine(config))
        findings.of(lambda: disk.shared_memory_is_writable(config))
        findings.of(lambda: checks.network(config))
        findings.of(lambda: checks.metrics_port(config))
    findings.of(lambda: checks.role_host(config))
    findings.of(lambda: checks.transport(config, nodes.count))
    findings.of(lambda: checks.trackers(config))
    # Without it no process can be asked to import them.
    has_temporary_folder = findings.of(disk.temporary_folder)
    functions = functions or (look_at_functions(config) if has_temporary_folder else Found())
    for problem in functions.problems:
        findings.of(problem.tell)
    if config.evaluation is not None and config.evaluation.suites:
        scorers = findings.of(lambda: look_at_functions(scoring(config)))
        for problem in scorers.problems if scorers is not None else ():
            findings.of(problem.tell)
    for i, judge in enumerate(config.reward.judges):
        findings.of(partial(check_judge, judge, f"reward.judges.{i}"))
        findings.of(partial(checks.initial_judge, config, judge, f"reward.judges.{i}.model"))
    findings.of(lambda: checks.trainer(config))
    findings.of(lambda: checks.evaluation(config))
    return _Independent(functions, bool(findings.of(lambda: checks.dataset(config))))


@dataclass(frozen=True, slots=True)
class _Scene:
    """What models and data are looked at for."""

    config: Config
    placement: Placement | None
    """None where there is no way to place the roles."""
    machine: Machine
    independent: _Independent
    is_elsewhere: bool
    needs_all: bool


@dataclass(frozen=True, slots=True)
class _Known:
    models: KnownModels
    tokenizer: PreTrainedTokenizerBase | None
    prompts: PromptSet | None
    held_out: PromptSet | None
    outline: Outline | None
    """None without a placement."""
    decoding: str | None
    """What may surprise about how the engine decodes."""


def _known(scene: _Scene, findings: Findings, *, fetches: bool) -> _Known:
    """Models and prompts, and what they imply, as far as they are here; `fetches` what the hub's dataset
    has."""
    config = scene.config
    models, tokenizer = look_for_models(config, findings)
    findings.of(lambda: checks.tensor_parallel(config, models.policy))
    findings.of(lambda: checks.adapted_layers(config, models))
    if models.policy is not None and scene.placement is not None:
        findings.of(partial(checks.family, config, scene.placement))
    findings.of(lambda: checks.stop_tokens(config, models.policy))
    findings.of(lambda: checks.kept_sets(config, models.policy))
    if tokenizer is not None:
        findings.of(partial(thinking_of, config.reward, tokenizer))
    demonstrations = None if config.sft is None else config.sft.data(config.data)
    if tokenizer is not None and demonstrations is not None and (fetches or not is_on_hub(demonstrations)):
        from asyncrl.data.demonstrations import load_demonstrations  # imports transformers

        findings.of(partial(load_demonstrations, config, tokenizer))
    decoding = findings.of(lambda: checks.decoding(config, models.policy))
    if not scene.is_elsewhere:
        on_gpu = scene.placement is not None and any(p.gpus for p in scene.placement.of(TRAINER))
        findings.of(lambda: disk.shared_memory_has_room(config, models.policy, scene.machine, on_gpu=on_gpu))
    prompts = held_out = rows = longest = mean = None
    if scene.independent.has_rows and (fetches or not _reads_hub(config)):
        prompts, held_out, rows = _prompts(config, tokenizer, findings)
    elif scene.independent.has_rows and not scene.needs_all:
        findings.missing.append(_unread(config))
    if tokenizer is not None and config.teacher is not None and scene.needs_all:
        from asyncrl.trainer.lessons.endpoint import check as check_teacher

        context = None if prompts is None else config.rollout.context_tokens(prompts.longest_tokens)
        findings.of(partial(check_teacher, config.teacher, tokenizer, context))
    if prompts is not None:
        longest = prompts.longest_tokens
        mean = sum(len(row.prompt_ids) for row in prompts) / len(prompts)
        if findings.of(partial(checks.reward_routes, config, scene.independent.functions.needs, prompts)):
            findings.of(partial(check_pairs, config, models.reward, prompts))
        findings.of(partial(checks.choices, config, scene.independent.functions.needs, prompts))
        if tokenizer is not None:
            findings.of(partial(checks.reference_answers, config, prompts, tokenizer))
        findings.of(partial(checks.prompts_fit, config, models.policy, prompts))
        findings.of(partial(checks.initial_judge_fits, config, models.policy, prompts))
        if scene.needs_all:
            findings.of(partial(checks.servers, config, prompts))
    if held_out is not None:
        needs = scene.independent.functions.needs
        findings.of(partial(checks.reward_routes, config, needs, by_scorer(config, held_out)[0]))
        findings.of(partial(checks.prompts_fit, config, models.policy, held_out))
    implied = None
    if scene.placement is not None:
        gpu_bytes = scene.machine.gpu_bytes
        implied = outline(config, scene.placement, models, rows, longest, gpu_bytes, mean_prompt_tokens=mean)
        findings.of(partial(gpu_checks.shares, config, implied))
    return _Known(models, tokenizer, prompts, held_out, implied, decoding)


def _plan(
    scene: _Scene, known: _Known, findings: Findings, gpus_here: int, folders: Mapping[str, str]
) -> Plan:
    """Of what nothing is wrong with."""
    config, placement, implied = scene.config, scene.placement, known.outline
    assert placement is not None
    assert implied is not None
    warnings = [*gpu_checks.warnings(config, placement, implied), *checks.warnings(config, implied)]
    if known.decoding is not None:
        warnings.append(known.decoding)
    if implied.paces:
        warnings += pace.warnings(config, implied.paces[-1])
    if known.prompts is not None and known.tokenizer is not None:
        warnings += checks.prompt_warnings(config, known.prompts, known.tokenizer)
    if not scene.is_elsewhere:
        warnings += checks.machine_warnings(scene.machine, implied)
        warnings += checks.disk_warnings(config, implied)
    tokenizer = None if scene.needs_all else known.tokenizer
    return Plan(
        config=config,
        machine=scene.machine,
        gpus_here=gpus_here,
        is_elsewhere=scene.is_elsewhere,
        placement=placement,
        outline=implied,
        prompts=known.prompts,
        held_out=known.held_out,
        models=known.models,
        missing=tuple(findings.missing),
        stops=None if tokenizer is None else _stops(config, tokenizer),
        warnings=tuple(warnings),
        user_files=UserFiles.of(scene.independent.functions),
        folders=folders,
    )


def _stops(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    from asyncrl.data.stops import stop_tokens  # imports transformers

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
        f"{told(config.data)}: the rows are not known before they are fetched",
        command="a run fetches it at its start",
    )


def _reads_hub(config: Config) -> bool:
    return any(map(is_on_hub, (config.data, *config.scored_data)))


def _prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, findings: Findings
) -> tuple[PromptSet | None, PromptSet | None, int | None]:
    """The prompts to train on and those to evaluate on, if they can be tokenised, and how many the former
    are, if the rows can be read."""
    if tokenizer is None:
        return None, None, findings.of(lambda: checks.enough_rows(config, count_rows(config.data)))
    prompts = findings.of(lambda: load_prompts(config.data, tokenizer))
    if prompts is None or findings.of(lambda: checks.enough_rows(config, prompts.counts())) is None:
        return None, None, None
    trained, held_out = prompts.split(config.data.held_out_rows)
    has_none = config.evaluation is None
    evaluated = None if has_none else findings.of(lambda: scored(config, tokenizer, held_out))
    return findings.of(lambda: with_hints(trained, config.data, tokenizer)), evaluated, len(trained)
