"""`samples.jsonl`: some responses of a run's training batches, for people to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.collector import without_the_collector
from asyncrl.core.records import NOT_SAMPLED, Batch, FinishReason, Group, Trajectory
from asyncrl.observe.metrics import cut_after

FILE_NAME = "samples.jsonl"
KINDS = ("best", "worst", "longest", "first", "random")
"""Why a response may be chosen."""


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """A response from training or from an evaluation."""

    step: int
    """The training step, counting from 1 as in `metrics.jsonl`; in an evaluation the version, 0 where that is
    not of a run."""
    chosen: list[str]
    """Why it was chosen: some of `KINDS`, as the best response of its batch, and so on."""
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
    spans: list[tuple[int, int]] = []
    """The response in pieces: how many characters the policy version sampled, or `NOT_SAMPLED` (a tool's
    answer, a user's turn)."""
    segment: int = 0
    """Number of the segment, where the response was split into several; each is a sample."""
    turn_parts: dict[str, list[float]] = {}
    """Where the reward was earned by turns: of each part, what each trained turn has earned."""

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
        response = decode(trajectory.token_ids[begins:].tolist())
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
            response=response,
            model=model,
            spans=list(_spans(trajectory.token_ids[begins:], versions[begins:], response, decode)),
            segment=trajectory.segment,
            turn_parts={name: list(values) for name, values in trajectory.turn_parts.items()},
        )

    def heading(self) -> str:
        """Whose response it is, and why it was chosen."""
        chosen = f", {' and '.join(self.chosen)}" if self.chosen else ""
        return (
            f"{self.model or f'step {self.step}'}{chosen}{f', segment {self.segment}' * bool(self.segment)}"
        )

    def facts(self) -> str:
        """In one line: what it has earned, and where it comes from."""
        parts = "".join(f", {name} {value:.3g}" for name, value in self.parts.items())
        oldest, newest = self.versions
        versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
        tokens = f"{self.tokens} tokens ({self.finish})"
        return f"reward {self.reward:.3g}{parts}; {tokens} of {versions}; row {self.row}"

    def pieces(self) -> Iterator[tuple[str, int]]:
        """The response in pieces of one version each, as `spans` says."""
        at = 0
        for length, version in self.spans or [(len(self.response), self.versions[1])]:
            yield self.response[at : at + length], version
            at += length

    def line(self) -> bytes:
        """A line of the file."""
        return msgspec.json.encode(self) + b"\n"


def is_kept(step: int) -> bool:
    """Whether samples of a step are kept: all of the first hundred steps, then every tenth, from step 1000 on
    every hundredth, and so on, so that the file of a long run stays small."""
    return step % 10 ** max(0, int(math.log10(max(1, step))) - 1) == 0


def choose(groups: Iterable[Group], seed: int = 0) -> Iterator[tuple[list[str], Group, Trajectory]]:
    """The best, worst, longest and first response and a random one, by `seed`: the segments of each, once,
    with all reasons why it was chosen."""
    everything = [(group, member) for group in groups for member in group.members()]
    at_random = int(np.random.default_rng(seed).integers(len(everything)))
    orders: Sequence[Callable[[int, Sequence[Trajectory]], float]] = (
        lambda _, member: -member[0].reward,
        lambda _, member: member[0].reward,
        lambda _, member: -sum(t.sampled_tokens for t in member),
        lambda _, member: 0,
        lambda place, _: place != at_random,
    )
    places = {
        why: min(range(len(everything)), key=lambda i: order(i, everything[i][1]))
        for why, order in zip(KINDS, orders, strict=True)
    }
    for place in dict.fromkeys(places.values()):
        group, member = everything[place]
        for trajectory in member:
            yield [why for why, at in places.items() if at == place], group, trajectory


def _spans(
    ids: NDArray[np.int32], versions: NDArray[np.int32], text: str, decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[int, int]]:
    """`Sample.spans` of tokens whose text is `text`. A character whose bytes are of two spans belongs to the
    first."""
    ends = [*(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(ids)]
    before = 0
    for end in ends:
        until = len(text) if end == len(ids) else min(len(text), max(before, len(decode(ids[:end].tolist()))))
        yield until - before, int(versions[end - 1])
        before = until


class SamplesWriter(AbstractContextManager["SamplesWriter"]):
    """Appends to `samples.jsonl` in the run directory.

    decode: from token ids to text, including special tokens. after_step: the step that the run continues
    from; later samples are removed on opening.
    """

    def __init__(self, run_dir: Path, decode: Callable[[Sequence[int]], str], after_step: int = 0) -> None:
        path = run_dir / FILE_NAME
        cut_after(path, after_step)
        self._file = path.open("ab")
        self._decode = decode

    def write(self, batch: Batch) -> None:
        """Write some responses of a step's batch, if samples of that step are kept."""
        step = batch.step + 1
        if not is_kept(step):
            return
        for chosen, group, trajectory in choose(batch.groups, seed=step):
            self._file.write(Sample.of(step, chosen, group, trajectory, self._decode).line())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


@without_the_collector()
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


def as_table(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """One column for each field but `turn_parts`, and for each part of the reward `reward/PART`; None where a
    sample has no such part. `versions` are two columns."""
    fields = ("step", "group", "row", "reward", "tokens", "segment", "model", "prompt", "response", "chosen")
    return {
        **{name: [getattr(sample, name) for sample in samples] for name in fields},
        "finish": [sample.finish.value for sample in samples],
        "oldest_version": [sample.versions[0] for sample in samples],
        "newest_version": [sample.versions[1] for sample in samples],
        "spans": [[[len(text), version] for text, version in sample.pieces()] for sample in samples],
        **{
            f"reward/{part}": [sample.parts.get(part) for sample in samples]
            for part in sorted({part for sample in samples for part in sample.parts})
        },
    }


def printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor, change its colours or turn the
    direction of what follows."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, most: int) -> str:
    """The text without its middle, if it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
