"""What a config implies, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from asyncrl.config import Config, dump
from asyncrl.runtime.outline import Outline, Processes
from asyncrl.runtime.preflight import Prepared
from asyncrl.units import format_bytes


def show(prepared: Prepared, console: Console | None = None) -> None:
    """Print the resolved config and what it implies."""
    console = console or Console(highlight=False, soft_wrap=False)
    _heading(console, "Settings")
    console.print(dump(prepared.config).rstrip(), markup=False)
    _heading(console, "Processes")
    console.print(_processes(prepared))
    _heading(console, "What the settings imply")
    console.print(_table(("", ""), _implied(prepared.config, prepared.outline)))
    _heading(console, "Memory, estimated")
    console.print(_memory(prepared.outline))
    if prepared.prompts.skipped:
        _heading(console, "Bad rows, left out")
        for bad in prepared.prompts.skipped[:10]:
            console.print(f"  {bad}", markup=False)
        if len(prepared.prompts.skipped) > 10:
            console.print(f"  ... and {len(prepared.prompts.skipped) - 10:,} more")
    for warning in prepared.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    console.print("dry run: nothing was started")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, show_header=any(columns), pad_edge=True, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _processes(prepared: Prepared) -> Table:
    rows = [
        (_times(p.count, p.role), _threads(p), f"GPU {', '.join(map(str, p.gpus))}" if p.gpus else "CPU")
        for p in prepared.outline.processes
    ]
    machine = prepared.machine
    gpus = f"{machine.gpus} GPUs" if machine.gpus > 1 else "1 GPU" if machine.gpus else "no GPU"
    rows.append(("this machine", f"{machine.cores} cores, {format_bytes(machine.memory_bytes)}", gpus))
    return _table(("", "", ""), rows)


def _times(count: int, role: str) -> str:
    return f"{count} × {role}" if count > 1 else role


def _threads(p: Processes) -> str:
    if not p.threads:
        return "as needed"
    return f"{p.threads} thread{'s' * (p.threads > 1)}{' each' * (p.count > 1)}"


def _implied(config: Config, o: Outline) -> list[tuple[str, str]]:
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
        ("response tokens a step", f"at most {o.max_response_tokens_per_step:,}"),
        ("tokens a step, prompts included", f"at most {o.max_tokens_per_step:,}"),
        ("optimizer updates a step", updates),
        ("staleness of a trained token", staleness),
        ("the same in optimizer updates", f"at most {o.max_staleness_updates:,}"),
        ("groups outstanding", f"at most {outstanding}"),
        ("responses decoding at once", f"at most {decoding:,} in {o.slots:,} slots"),
        ("prompts", f"{o.rows:,} usable rows, the longest of {o.longest_prompt_tokens:,} tokens"),
        ("epochs", f"{o.epochs:.2f}"),
    ]


def _versions(n: int) -> str:
    return f"{n} version{'s' * (n != 1)}"


def _memory(o: Outline) -> Table:
    counts = {p.role: p.count for p in o.processes}
    rows = []
    for memory in o.memory:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in memory.parts.items() if n)
        each = f"{format_bytes(memory.total_bytes)}{' each' * (counts.get(memory.role, 1) > 1)}"
        rows.append((memory.role, each, parts))
    return _table(("", "", ""), rows)
