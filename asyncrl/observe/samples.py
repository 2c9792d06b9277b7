"""`samples.jsonl`: some responses of a run's training batches, to be read by a person."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from asyncrl.core.records import NOT_SAMPLED, Batch, FinishReason, Group, Trajectory

FILE_NAME = "samples.jsonl"


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One response that was trained on, or with which a model was evaluated."""

    step: int
    """The training step, from 1 on, as in `metrics.jsonl`; 0 in an evaluation."""
    chosen: list[str]
    """What is special about it: the `best`, `worst` or `longest` response of its batch, or the `first`."""
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
    model: str = ""
    """The one that was evaluated."""

    @classmethod
    def of(
        cls,
        step: int,
        chosen: list[str],
        group: Group,
        trajectory: Trajectory,
        decode: Callable[[Sequence[int]], str],
        model: str = "",
    ) -> Self:
        """decode: text of token ids, special tokens included."""
        versions = trajectory.token_versions()
        sampled = versions[versions != NOT_SAMPLED]
        begins = int(np.argmax(trajectory.loss_mask))
        return cls(
            step=step,
            chosen=chosen,
            group=group.group_id,
            row=group.row,
            reward=float(trajectory.reward),
            parts={name: float(value) for name, value in trajectory.reward_parts.items()},
            tokens=trajectory.sampled_tokens,
            finish=trajectory.finish_reason,
            versions=(int(sampled.min()), int(sampled.max())),
            prompt=decode(trajectory.token_ids[:begins].tolist()),
            response=decode(trajectory.token_ids[begins:].tolist()),
            model=model,
        )

    def line(self) -> bytes:
        """As in the file."""
        return msgspec.json.encode(self) + b"\n"


def is_kept(step: int) -> bool:
    """Whether samples of a step are kept: of the first hundred steps all, then of every tenth, from the
    thousandth on of every hundredth, and so on. So the file of a long run stays small."""
    return step % 10 ** max(0, int(math.log10(max(1, step))) - 1) == 0


def choose(groups: Iterable[Group]) -> Iterator[tuple[list[str], Group, Trajectory]]:
    """The best, worst, longest and first response; each once, with all that it is."""
    everything = [(group, t) for group in groups for t in group.trajectories]
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
            path.write_bytes(b"".join(sample.line() for sample in kept))
        self._file = path.open("ab")
        self._decode = decode

    def write(self, batch: Batch) -> None:
        """Some responses of the batch of a step, if any of that step are kept."""
        step = batch.step + 1
        if not is_kept(step):
            return
        for chosen, group, trajectory in choose(batch.groups):
            self._file.write(Sample.of(step, chosen, group, trajectory, self._decode).line())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_samples(path: Path) -> list[Sample]:
    """All of a run's, by its directory, or of a file of them; a line that a crash has cut short is left out.
    Raises `FileNotFoundError`."""
    file = path / FILE_NAME if path.is_dir() else path
    decoder, found = msgspec.json.Decoder(Sample), []
    for line in file.read_bytes().splitlines():
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError:
            continue
    return found
