"""Shows what a config implies, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from asyncrl.config import Config, dump
from asyncrl.data.prompts import first_bad_rows
from asyncrl.plan.disk import Disk
from asyncrl.plan.memory.estimate import SHARED_WEIGHTS, GpuLoad, Memory
from asyncrl.plan.outline import Outline, Processes, mix_epochs
from asyncrl.plan.pace import Pace
from asyncrl.plan.preflight import Plan
from asyncrl.plan.resources import cores_wanted
from asyncrl.units import format_bytes

UNKNOWN = "unknown"


def show(plan: Plan, console: Console | None = None, *, verbose: bool = False) -> None:
    """Print the plan, the settings that differ from their defaults (verbose: all settings), and what this
    machine lacks."""
    console = console or Console(highlight=False, soft_wrap=False)
    console.print(f"\n{_title(plan)}", markup=False)
    _heading(console, "Who computes where")
    console.print(_table(("", "", ""), _processes(plan)))
    if plan.outline.gpus:
        _heading(console, "GPUs" + " (planned for: this machine does not have them)" * plan.is_elsewhere)
        console.print(_table(("", "", "", ""), _gpus(plan.outline.gpus)))
    _heading(console, "Memory and disk, estimated")
    console.print(_table(("", "", ""), _memory(plan)))
    _heading(console, "A training step, and all of them")
    console.print(_table(("", ""), _implied(plan)))
    if plan.placement.gpus:
        _heading(console, "Time, estimated for H100s; it may be off by half")
        _show_time(plan, console)
    if plan.prompts is not None and plan.prompts.skipped:
        _heading(console, "Bad rows, skipped")
        for line in first_bad_rows(plan.prompts.skipped):
            console.print(line, markup=False)
    _heading(console, "Settings" + " that differ from the defaults (all: --verbose)" * (not verbose))
    console.print(dump(plan.config, changed_only=not verbose).rstrip(), markup=False)
    if UNKNOWN in (row[1] for row in _memory(plan)):
        console.print(
            "\nwhat is unknown depends on models that are not here; a folder with a model's config.json is "
            "enough for an estimate: model.path=FOLDER"
        )
    if plan.missing:
        _heading(console, "What this machine lacks")
        for error in plan.missing:  # one line each, however narrow the terminal, for copying
            console.print(f"- {error.what}; {error.command}", markup=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    console.print("dry run: nothing was started")


def _title(plan: Plan) -> str:
    config, gpus = plan.config, plan.placement.gpus
    scored = " and ".join(model.path for model in config.reward.models)
    by = f", scored by {scored}" * bool(scored)
    where = _gpu_count(gpus) if gpus else "the CPU"
    return f"{config.run.name}: {config.run.steps:,} steps of {config.model.path}{by}, on {where}"


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _table(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, show_header=any(columns), pad_edge=True, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _processes(plan: Plan) -> Iterator[tuple[str, ...]]:
    for p in plan.outline.processes:
        yield f"{p.count} × {p.role}" if p.count > 1 else p.role, _threads(p), _where(p)
    machine = plan.machine
    here = f"{machine.cores} cores, {format_bytes(machine.memory_bytes)}"
    nodes, each = plan.placement.nodes, plan.placement.gpus_each
    yield "this machine" if nodes == 1 else f"{nodes} like this one", here, _gpu_count(plan.gpus_here)
    if nodes > 1 and each:
        yield "nodes", f"{nodes} of {_gpu_count(each)}", f"node 0 has GPU 0 to {each - 1}, and so on"
    if plan.is_elsewhere:
        yield "planned for", "", f"{_gpu_count(machine.gpus)} of {format_bytes(machine.gpu_bytes[0])}"


def _where(p: Processes) -> str:
    if p.gpus:
        return f"GPU {_numbers(p.gpus, p.count)}"
    return f"CPU, core{'s' * (len(p.cores) > 1)} {_numbers(p.cores, p.count)}" if p.cores else "CPU"


def _numbers(devices: Sequence[int], processes: int) -> str:
    """Numbers of the GPUs or cores of `processes` processes."""
    several = f" ({len(devices) // processes} each)" * (len(devices) > processes > 1)
    return f"{', '.join(map(str, devices))}{several}"


def _gpu_count(n: int) -> str:
    return f"{n or 'no'} GPU{'s' * (n > 1)}"


def _threads(p: Processes) -> str:
    if not p.threads:
        return "as needed"
    return f"{p.threads} thread{'s' * (p.threads > 1)}{' each' * (p.count > 1)}"


def _gpus(loads: Iterable[GpuLoad]) -> Iterator[tuple[str, ...]]:
    for load in loads:
        sizes = ["" if n is None else f" {format_bytes(n)}" for n in load.bytes]
        parts = ", ".join(f"{role}{size}" for role, size in zip(load.roles, sizes, strict=True))
        known = f"{'over ' * (None in load.bytes)}{format_bytes(load.total_bytes)}"
        if not any(sizes):
            known = UNKNOWN
        too_much = "too much" * (load.total_bytes > load.card_bytes)
        yield f"GPU {load.gpu}", parts, f"{known} of {format_bytes(load.card_bytes)}", too_much


def _implied(plan: Plan) -> list[tuple[str, str]]:
    config, o = plan.config, plan.outline
    eta, batch, size = config.staleness.bound, config.trainer.batch_groups, config.rollout.group_size
    kinds = {0: "synchronous", 1: "one step off"}
    kind = kinds.get(eta, f"on_stale: {config.staleness.on_stale}")
    staleness = f"at most {_versions(eta)} ({kind})"
    if config.staleness.fixed_lag:
        staleness = f"exactly {_versions(eta)} (before step {eta}: sampled by version 0)"
    updates = f"{o.updates_per_step} of {o.groups_per_update:g} groups, {o.total_updates:,} in all"
    outstanding = f"{o.max_groups_outstanding:,}, {o.max_responses_outstanding:,} responses"
    decoding = min(o.slots, o.max_responses_outstanding)
    return [
        ("steps", f"{config.run.steps:,}"),
        ("responses a step", f"{o.responses_per_step:,} ({batch} groups of {size})"),
        ("responses in all", f"{config.run.steps * o.responses_per_step:,}"),
        ("response tokens a step", f"at most {o.max_response_tokens_per_step:,}"),
        ("tokens a step, prompts included", f"at most {o.max_tokens_per_step:,}"),
        *_rows(plan),
        ("optimizer updates a step", updates),
        ("staleness of a trained token", staleness),
        ("the same in optimizer updates", f"at most {o.max_staleness_updates:,}"),
        ("groups outstanding", f"at most {outstanding}"),
        ("responses decoding at once", f"at most {decoding:,} in {o.slots:,} slots"),
        *_kv_room(config, o),
        *_stops(plan),
        *_cores(plan),
        ("prompts", _prompts(plan)),
        ("epochs", _epochs(plan)),
    ]


def _epochs(plan: Plan) -> str:
    data, epochs = plan.config.data, plan.outline.epochs
    if data.mix and plan.prompts is not None:
        each = mix_epochs(plan.config, plan.prompts.counts())
        return ", ".join(f"{name} {n:.2f}" for name, n in zip(data.names, each, strict=True))
    return UNKNOWN if epochs is None else f"{epochs:.2f}"


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What keeps the trainer from packing, if anything does."""
    for name, facts in plan.models.trained.items():
        if facts.form.unpacked is not None:
            yield f"sequences of the {name}", f"not packed: {facts.form.unpacked}"


def _stops(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.stops is not None:
        yield "a response ends at", ", ".join(plan.stops) or "nothing but its limit"


def _show_time(plan: Plan, console: Console) -> None:
    paces, o, run = plan.outline.paces, plan.outline, plan.config.run
    if paces:
        console.print(_table(("", *("",) * len(paces)), _times_of(paces, run.steps)))
    else:
        console.print("  unknown: the size of a model or the speed of a device is not known")
    if run.gpu_hours is None:
        return
    gpus = plan.placement.gpus
    console.print(
        f"  GPU hours allowed: {run.gpu_hours:g}, {run.gpu_hours / gpus:.2f} h of {gpus} GPUs (run.gpu_hours)"
    )
    if o.affordable_tokens is not None:
        console.print(
            f"  They pay for all {run.steps:,} steps up to a mean response of about "
            f"{o.affordable_tokens:,.0f} tokens; with longer responses the run ends before its last step."
        )
    elif paces:
        console.print(f"  They pay for all {run.steps:,} steps, however long the responses.")


def _times_of(paces: Sequence[Pace], steps: int) -> Iterator[tuple[str, ...]]:
    """A column for each mean response length."""

    def row(name: str, of: Callable[[Pace], str]) -> tuple[str, ...]:
        return name, *map(of, paces)

    yield row("mean response", lambda pace: f"{pace.response_tokens:,.0f} tokens")
    yield row("a step", lambda pace: f"{pace.step_s:,.0f} s")
    yield row("  training", lambda pace: f"{pace.train_s:,.0f} s")
    yield row("  generation", lambda pace: f"{pace.generate_s:,.0f} s")
    for kind in paces[0].score_s:
        yield row(f"  {kind}", lambda pace, kind=kind: f"{pace.score_s[kind]:,.0f} s")
    yield row("sets the pace", lambda pace: ", ".join(sorted(pace.bottleneck)))
    for kind in paces[0].idle:
        yield row(f"idle, {kind}", lambda pace, kind=kind: f"{pace.idle[kind]:.0%}")
    yield row("the run", lambda pace: f"{pace.hours(steps):,.1f} h")
    yield row("GPU hours", lambda pace: f"{pace.gpu_hours(steps):,.1f}")


def _versions(n: int) -> str:
    return f"{n} version{'s' * (n != 1)}"


def _kv_room(config: Config, o: Outline) -> Iterator[tuple[str, str]]:
    if o.kv_sequences is not None:
        enough = " (as many as it has slots)" * (o.kv_sequences >= config.rollout.slots)
        yield "of full length, an engine's KV cache holds", f"about {o.kv_sequences:,}{enough}"


def _cores(plan: Plan) -> Iterator[tuple[str, str]]:
    """How the cores are divided among processes that compute on them."""
    wanted, there = sum(cores_wanted(plan.config, plan.placement).values()), len(plan.machine.own_cores)
    if not wanted or plan.is_elsewhere:
        return
    how = "shared by all"
    if any(place.cores for place in plan.placement.places):
        how = "each computing process has its own"
    elif plan.config.placement.pin_cores == "never":
        how += " (placement.pin_cores=never)"
    elif not there:
        how += ": this system cannot reserve cores"
    else:
        how += f": one per thread would take {wanted}, and there are {there}"
    yield "cores", how


def _prompts(plan: Plan) -> str:
    o, limit = plan.outline, plan.config.data.max_prompt_tokens
    if o.rows is None:
        return f"{UNKNOWN}, of at most {limit:,} tokens"
    if plan.prompts is None:
        return f"{o.rows:,} rows, not tokenised"
    return f"{o.rows:,} usable rows, the longest of {o.longest_prompt_tokens:,} tokens"


def _memory(plan: Plan) -> Iterator[tuple[str, ...]]:
    o, entries = plan.outline, {m.kind: m for m in plan.outline.memory}
    for kind in (*plan.placement.kinds, SHARED_WEIGHTS):
        each = " each" * (len(plan.placement.of(kind)) > 1)
        if kind in entries:
            yield kind, f"{format_bytes(entries[kind].total_bytes)}{each}", _parts(entries[kind])
        else:
            yield kind, UNKNOWN, ""
    host = UNKNOWN if o.host_memory_bytes is None else format_bytes(o.host_memory_bytes)
    yield "host memory", host, "in all"
    yield "disk", UNKNOWN if o.disk is None else format_bytes(o.disk.total_bytes), _checkpoints(o.disk)


def _checkpoints(disk: Disk | None) -> str:
    """The large files in the run directory."""
    if disk is None or not disk.checkpoints:
        return ""
    if disk.checkpoints == 1:
        return "a checkpoint at the end"
    return (
        f"{disk.checkpoints} checkpoints of {format_bytes(disk.checkpoint_bytes)}, one of them being written"
    )


def _parts(memory: Memory) -> str:
    parts = _named(memory.parts)
    in_host = _named(memory.host_parts)
    return f"{parts}; in host memory {in_host}" if in_host else parts


def _named(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if n)
