"""Opens the durable state of a run: its prompts, its ledger file, and the coordinator restored from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator, LoopSettings
from asyncrl.curriculum.filters import make_filters
from asyncrl.curriculum.mix import make_mix
from asyncrl.curriculum.samplers import make_sampler
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import LedgerStore


def loop_settings(config: Config, prompts: Sequence[Prompt] = ()) -> LoopSettings:
    """The coordinator's settings, for training on these."""
    return LoopSettings(
        batch_groups=config.trainer.batch_groups,
        max_staleness=config.staleness.max_staleness,
        on_stale=config.staleness.on_stale,
        total_steps=config.run.steps,
        filters=make_filters(config.objective, prompts),
        max_attempts=config.rollout.max_attempts,
        fixed_lag=config.staleness.fixed_lag,
        batch_tokens=config.trainer.batch_tokens,
    )


@contextmanager
def open_ledger(run_dir: RunDir) -> Iterator[LedgerStore[bytes]]:
    """The ledger's file, created if there is none; closed at the end."""
    store: LedgerStore[bytes] = LedgerStore(run_dir.ledger, bytes, bytes)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_state(
    config: Config, run_dir: RunDir
) -> Iterator[tuple[PromptSet, LedgerStore[bytes], Coordinator[bytes]]]:
    """Prompts, store and coordinator; the store is closed at the end."""
    prompts = PromptSet.load(run_dir.prompts)
    with open_ledger(run_dir) as store:
        coordinator = store.load(
            loop_settings(config, prompts.rows),
            prompts.counts(),
            config.run.seed,
            shuffle=config.data.shuffle,
            multiple_of=config.epoch_multiple,
            mix=make_mix(config.data.mix),
            sampler=make_sampler(config.data, prompts.rows),
        )
        yield prompts, store, coordinator
