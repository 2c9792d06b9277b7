"""`samples.jsonl`: some responses of a run's training batches, to be read by a person."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from asyncrl.core.records import NOT_SAMPLED, Batch, FinishReason, Group, Trajectory

FILE_NAME = "samples.jsonl"


class Sample(msgspec.Struct, frozen=True):
    """One response that was trained on."""

    step: int
    """The training step, from 1 on, as in `metrics.jsonl`."""
    chosen: list[str]
    """Why it is here: the `best`, `worst` or `longest` response of its batch, or the `first`."""
    group: int
    row: int
    """Of the prompt, among the usable rows of the dataset."""
    reward: float
    parts: dict[str, float]
    tokens: int
    finish: FinishReason
    versions: tuple[int, int]
    """The oldest and the newest policy version that sampled a token of it."""
    prompt: str
    response: str
    """Special tokens included, as they were sampled."""


def is_kept(step: int) -> bool:
    """Whether samples of a step are kept: of the first hundred steps all, then of every tenth, from the
    thousandth on of every hundredth, and so on. So the file of a long run stays small."""
    return step % 10 ** max(0, int(math.log10(max(1, step))) - 1) == 0


def choose(batch: Batch) -> Iterator[tuple[list[str], Group, Trajectory]]:
    """The batch's best, worst, longest and first response; each once, with all that it is."""
    everything = [(group, t) for group in batch.groups for t in group.trajectories]
    picks: Mapping[str, Callable[[tuple[Group, Trajectory]], float]] = {
        "best": lambda pair: -pair[1].reward,
        "worst": lambda pair: pair[1].reward,
        "longest": lambda pair: -pair[1].sampled_tokens,
        "first": lambda pair: 0,
    }
    places = {
        why: min(range(len(everything)), key=lambda i: order(everything[i])) for why, order in picks.items()
    }
    for place in dict.fromkeys(places.values()):
        yield [why for why, at in places.items() if at == place], *everything[place]


class SamplesWriter:
    """Appends to `samples.jsonl` in the run directory.

    decode: text of token ids, special tokens included. after_step: the step that the run goes on from; later
    samples are removed on opening.
    """

    def __init__(self, run_dir: Path, decode: Callable[[Sequence[int]], str], after_step: int = 0) -> None:
        path = run_dir / FILE_NAME
        if path.exists():
            kept = [sample for sample in read_samples(run_dir) if sample.step <= after_step]
            path.write_bytes(b"".join(map(_line, kept)))
        self._file = path.open("ab")
        self._decode = decode

    def write(self, batch: Batch) -> None:
        """Some responses of the batch of a step, if any of that step are kept."""
        step = batch.step + 1
        if not is_kept(step):
            return
        for why, group, trajectory in choose(batch):
            self._file.write(_line(self._sample(step, why, group, trajectory)))
        self._file.flush()

    def _sample(self, step: int, why: list[str], group: Group, trajectory: Trajectory) -> Sample:
        versions = trajectory.token_versions()
        sampled = versions[versions != NOT_SAMPLED]
        begins = int(np.argmax(trajectory.loss_mask))
        return Sample(
            step=step,
            chosen=why,
            group=group.group_id,
            row=group.row,
            reward=float(trajectory.reward),
            parts={name: float(value) for name, value in trajectory.reward_parts.items()},
            tokens=trajectory.sampled_tokens,
            finish=trajectory.finish_reason,
            versions=(int(sampled.min()), int(sampled.max())),
            prompt=self._decode(trajectory.token_ids[:begins].tolist()),
            response=self._decode(trajectory.token_ids[begins:].tolist()),
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_samples(run_dir: Path) -> list[Sample]:
    """All of a run's; a line that a crash has cut short is left out. Raises `FileNotFoundError`."""
    decoder, found = msgspec.json.Decoder(Sample), []
    for line in (run_dir / FILE_NAME).read_bytes().splitlines():
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError:
            continue
    return found


def _line(sample: Sample) -> bytes:
    return msgspec.json.encode(sample) + b"\n"
