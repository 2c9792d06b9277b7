"""What a config implies, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from asyncrl.config import Config, dump
from asyncrl.runtime.compute import USUAL_FLOPS_PER_GPU_S
from asyncrl.runtime.cores import cores_wanted
from asyncrl.runtime.memory import SHARED_WEIGHTS, GpuLoad, Memory
from asyncrl.runtime.outline import Outline, Processes
from asyncrl.runtime.preflight import Plan
from asyncrl.units import format_bytes

UNKNOWN = "unknown"


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the resolved config and what it implies."""
    console = console or Console(highlight=False, soft_wrap=False)
    _heading(console, "Settings")
    console.print(dump(plan.config).rstrip(), markup=False)
    _heading(console, "Processes")
    console.print(_table(("", "", ""), _processes(plan)))
    if plan.outline.gpus:
        _heading(console, "GPUs" + " (planned for: this machine does not have them)" * plan.is_elsewhere)
        console.print(_table(("", "", "", ""), _gpus(plan.outline.gpus)))
    _heading(console, "What the settings imply")
    console.print(_table(("", ""), _implied(plan)))
    _heading(console, "Memory, estimated")
    console.print(_table(("", "", ""), _memory(plan)))
    if plan.prompts is not None and plan.prompts.skipped:
        _heading(console, "Bad rows, left out")
        for bad in plan.prompts.skipped[:10]:
            console.print(f"  {bad}", markup=False)
        if len(plan.prompts.skipped) > 10:
            console.print(f"  ... and {len(plan.prompts.skipped) - 10:,} more")
    if plan.missing and plan.is_elsewhere:
        _heading(console, "Not on this machine, so not checked")
        for message in plan.missing:
            console.print(f"- {message}", markup=False)
    if UNKNOWN in (row[1] for row in _memory(plan)):
        console.print(
            "what is unknown hangs on models that are not here; a folder with a model's config.json is "
            "enough for an estimate: model.path=FOLDER"
        )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    console.print("dry run: nothing was started")


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
        yield _times(p.count, p.role), _threads(p), _where(p)
    machine = plan.machine
    here = f"{machine.cores} cores, {format_bytes(machine.memory_bytes)}"
    yield "this machine", here, _gpu_count(plan.gpus_here)
    if plan.is_elsewhere:
        yield "planned for", "", f"{_gpu_count(machine.gpus)} of {format_bytes(machine.gpu_bytes[0])}"


def _where(p: Processes) -> str:
    if p.gpus:
        return f"GPU {_numbers(p.gpus, p.count)}"
    return f"CPU, core{'s' * (len(p.cores) > 1)} {_numbers(p.cores, p.count)}" if p.cores else "CPU"


def _numbers(devices: Sequence[int], processes: int) -> str:
    """Of the GPUs or cores of so many processes."""
    several = f" ({len(devices) // processes} each)" * (len(devices) > processes > 1)
    return f"{', '.join(map(str, devices))}{several}"


def _gpu_count(n: int) -> str:
    return f"{n or 'no'} GPU{'s' * (n > 1)}"


def _times(count: int, role: str) -> str:
    return f"{count} × {role}" if count > 1 else role


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
        ("optimizer updates a step", updates),
        ("staleness of a trained token", staleness),
        ("the same in optimizer updates", f"at most {o.max_staleness_updates:,}"),
        ("groups outstanding", f"at most {outstanding}"),
        ("responses decoding at once", f"at most {decoding:,} in {o.slots:,} slots"),
        *_kv_room(config, o),
        *_cores(plan),
        ("prompts", _prompts(plan)),
        ("epochs", UNKNOWN if o.epochs is None else f"{o.epochs:.2f}"),
        *_gpu_hours(plan),
    ]


def _gpu_hours(plan: Plan) -> list[tuple[str, str]]:
    """What the run may spend, and what its training takes at a usual pace."""
    gpus, budget, hours = plan.placement.gpus, plan.config.run.gpu_hours, plan.outline.training_hours
    rows = []
    if budget is not None and gpus:
        rows.append(
            ("GPU hours allowed", f"{budget:g}, {budget / gpus:.2f} h of {gpus} GPUs (run.gpu_hours)")
        )
    if hours is not None:
        pace = f"{USUAL_FLOPS_PER_GPU_S / 1e12:.0f} TFLOP/s a GPU"
        rows.append(
            (
                "GPU hours expected",
                f"{hours * gpus:.1f} if every response were of full length, {hours * gpus / 2:.1f} at half "
                f"of that, where training sets the pace at {pace}",
            )
        )
    return rows


def _versions(n: int) -> str:
    return f"{n} version{'s' * (n != 1)}"


def _kv_room(config: Config, o: Outline) -> Iterator[tuple[str, str]]:
    if o.kv_sequences is not None:
        enough = " (as many as it has slots)" * (o.kv_sequences >= config.rollout.slots)
        yield "of full length, an engine's KV cache holds", f"about {o.kv_sequences:,}{enough}"


def _cores(plan: Plan) -> Iterator[tuple[str, str]]:
    """How the cores are shared out, where something computes on them."""
    wanted, there = sum(cores_wanted(plan.config, plan.placement).values()), len(plan.machine.own_cores)
    if not wanted or plan.is_elsewhere or plan.config.run.mode == "inline":
        return
    how = "shared by all"
    if any(place.cores for place in plan.placement.places):
        how = "each computing process has its own"
    elif plan.config.placement.pin_cores == "never":
        how += " (placement.pin_cores=never)"
    elif not there:
        how += ": here, none can be kept for one process"
    else:
        how += f": {wanted} would be needed for one a thread, and there are {there}"
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


def _parts(memory: Memory) -> str:
    parts = _named(memory.parts)
    in_host = _named(memory.host_parts)
    return f"{parts}; in host memory {in_host}" if in_host else parts


def _named(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if n)
