"""`samples.jsonl`: some responses of a run's training batches, for people to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from asyncrl.core.records import NOT_SAMPLED, Batch, FinishReason, Group, Trajectory

FILE_NAME = "samples.jsonl"


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """A response from training or from an evaluation."""

    step: int
    """The training step, counting from 1 as in `metrics.jsonl`; in an evaluation the version, 0 where that is
    not of a run."""
    chosen: list[str]
    """Why it was chosen: the `best`, `worst`, `longest` or `first` response of its batch."""
    group: int
    row: int
    """Index of the prompt among the usable rows of the dataset."""
    reward: float
    parts: dict[str, float]
    tokens: int
    finish: FinishReason
    versions: tuple[int, int]
    """The oldest and the newest policy version that sampled its tokens."""
    prompt: str
    response: str
    """Includes special tokens, as they were sampled."""
    model: str = ""
    """The evaluated model."""

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
        """decode: from token ids to text, including special tokens."""
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
        """A line of the file."""
        return msgspec.json.encode(self) + b"\n"


def is_kept(step: int) -> bool:
    """Whether samples of a step are kept: all of the first hundred steps, then every tenth, from step 1000 on
    every hundredth, and so on, so that the file of a long run stays small."""
    return step % 10 ** max(0, int(math.log10(max(1, step))) - 1) == 0


def choose(groups: Iterable[Group]) -> Iterator[tuple[list[str], Group, Trajectory]]:
    """The best, worst, longest and first response; each once, with all reasons why it was chosen."""
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


class SamplesWriter(AbstractContextManager["SamplesWriter"]):
    """Appends to `samples.jsonl` in the run directory.

    decode: from token ids to text, including special tokens. after_step: the step that the run continues
    from; later samples are removed on opening.
    """

    def __init__(self, run_dir: Path, decode: Callable[[Sequence[int]], str], after_step: int = 0) -> None:
        path = run_dir / FILE_NAME
        if path.exists():
            kept = [sample for sample in read_samples(run_dir) if sample.step <= after_step]
            path.write_bytes(b"".join(sample.line() for sample in kept))
        self._file = path.open("ab")
        self._decode = decode

    def write(self, batch: Batch) -> None:
        """Write some responses of a step's batch, if samples of that step are kept."""
        step = batch.step + 1
        if not is_kept(step):
            return
        for chosen, group, trajectory in choose(batch.groups):
            self._file.write(Sample.of(step, chosen, group, trajectory, self._decode).line())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read_samples(path: Path) -> list[Sample]:
    """All samples in a run directory or in a file; a line that a crash cut short is left out. Raises
    `FileNotFoundError`."""
    file = path / FILE_NAME if path.is_dir() else path
    decoder, found = msgspec.json.Decoder(Sample), []
    for line in file.read_bytes().splitlines():
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError:
            continue
    return found


def printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor, change its colours or turn the
    direction of what follows."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
