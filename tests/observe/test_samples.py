"""Which responses are kept to be read, and what is shown of them."""

import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from asyncrl.cli.main import main
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan
from asyncrl.observe.pager import Pager
from asyncrl.observe.sample_text import Colours, as_text
from asyncrl.observe.samples import FILE_NAME, Sample, SamplesWriter, choose, is_kept, read_samples


def trajectory(reward, response, prompt="ab", version=3):
    ids = np.frombuffer((prompt + response).encode(), dtype=np.uint8).astype(np.int32)
    return Trajectory(
        token_ids=ids,
        loss_mask=np.arange(len(ids)) >= len(prompt),
        behavior_logprobs=np.zeros(len(ids), np.float32),
        versions=(VersionSpan(len(prompt), len(response), version),),
        finish_reason=FinishReason.STOP,
        reward=reward,
        reward_parts={"right": reward},
    )


def batch(step=4):
    groups = (
        Group(7, 70, [trajectory(0.5, "first"), trajectory(0.0, "worst")]),
        Group(8, 80, [trajectory(1.0, "best and longest"), trajectory(0.7, "x")]),
    )
    return Batch(step, step, 0, groups)


def text(ids):
    return bytes(ids).decode()


def test_the_best_the_worst_the_longest_and_the_first(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        writer.write(batch())
    found = {sample.response: sample for sample in read_samples(tmp_path)}
    reasons = {response: sample.chosen for response, sample in found.items()}
    assert sum("random" in chosen for chosen in reasons.values()) == 1
    assert {
        response: [why for why in chosen if why != "random"]
        for response, chosen in reasons.items()
        if chosen != ["random"]
    } == {
        "best and longest": ["best", "longest"],
        "worst": ["worst"],
        "first": ["first"],
    }
    best = found["best and longest"]
    assert (best.step, best.group, best.row, best.reward, best.parts) == (5, 8, 80, 1.0, {"right": 1.0})
    assert (best.prompt, best.tokens, best.finish, best.versions) == ("ab", 16, "stop", (3, 3))


def test_a_resumed_run_writes_its_steps_once(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        for step in range(3):
            writer.write(batch(step))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"step": 3, "cho')
    with SamplesWriter(tmp_path, text, after_step=2) as writer:
        writer.write(batch(2))
    kept = {step: len([*choose(batch(step - 1).groups, seed=step)]) for step in (1, 2, 3)}
    assert list(Counter(sample.step for sample in read_samples(tmp_path)).items()) == [*kept.items()]


def test_a_long_run_keeps_ever_fewer():
    assert [step for step in range(1, 131) if not is_kept(step)][:12] == [*range(101, 110), 111, 112, 113]
    assert sum(is_kept(step) for step in range(1, 100_001)) < 400


@pytest.fixture
def run_dir(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        for step in (0, 1):
            writer.write(batch(step))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "shown", "hidden"),
    [
        ([], ["step 2, best and longest: reward 1, right 1; 16 tokens (stop) of", "first"], "step 1"),
        (["--step", "1", "--longest"], ["step 1", "best and longest"], "worst"),
        (["--worst"], ["step 2", "worst"], "longest"),
    ],
)  # fmt: skip
def test_they_can_be_read(options, shown, hidden, run_dir, capsys):
    assert main(["samples", str(run_dir), *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert all(words in output for words in shown)
    assert hidden not in output


@pytest.mark.parametrize(
    ("options", "message"), [(["--step", "9"], "the nearest are of step 2"), ([], "it has no samples")]
)
def test_what_is_not_there_is_told(options, message, run_dir, capsys):
    if not options:
        (run_dir / FILE_NAME).unlink()
    assert main(["samples", str(run_dir), *options]) == 2
    assert message in capsys.readouterr().err


def test_turns_and_versions_are_spans_of_the_response(tmp_path):
    """Two turns with what was shown between them, the second of two versions; é has two tokens."""
    shown = trajectory(1.0, "yes|tool|é!", version=3)
    ids = shown.token_ids
    shown.loss_mask[2 + 3 : 2 + 9] = False
    shown.versions = (VersionSpan(2, 3, 3), VersionSpan(11, 1, 3), VersionSpan(12, 2, 4))
    shown.turn_parts = {"right": (0.25, 0.75)}
    assert len(ids) == 14
    decode = lambda ids: bytes(ids).decode(errors="replace")  # noqa: E731
    sample = Sample.of(1, ["best"], Group(0, 0, [shown]), shown, decode)
    assert [*sample.pieces()] == [("yes", 3), ("|tool|", -1), ("é", 3), ("!", 4)]
    plain = as_text(sample, Colours()).plain
    assert plain == "ab\n\n[turn 1, right 0.25]\nyes\n[shown]\n|tool|\n[turn 2, right 0.75]\né!"
    by_version = as_text(sample, Colours("version"))
    styles = {by_version.plain[s.start : s.end]: s.style for s in by_version.spans}
    assert styles["yes"] == styles["é"] != styles["!"]
    by_part = as_text(sample, Colours("right", {"right": (0.0, 1.0)}))
    styles = {by_part.plain[s.start : s.end]: s.style for s in by_part.spans}
    assert (styles["yes"], styles["!"]) == ("red", "green")


def test_segments_of_a_chosen_response_are_kept_together(tmp_path):
    first, second = trajectory(1.0, "one"), trajectory(1.0, "two")
    second.segment = 1
    with SamplesWriter(tmp_path, text) as writer:
        writer.write(Batch(0, 0, 0, (Group(0, 0, [first, second, trajectory(0.0, "x")]),)))
    best = [s for s in read_samples(tmp_path) if "best" in s.chosen]
    assert [(s.response, s.segment) for s in best] == [("one", 0), ("two", 1)]


@pytest.mark.parametrize(
    ("options", "responses"),
    [
        (["--where", "reward<0.5", "--step", "1"], ["worst"]),
        (["--where", "right>=0.5", "--where", "tokens<9", "--where", "step=2"], ["first"]),
        (["--contains", "and longest"], ["best and longest"] * 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_asked_for_is_exported(options, responses, ending, run_dir, tmp_path):
    file = tmp_path / f"out.{ending}"
    assert (
        main(
            [
                "samples",
                str(run_dir),
                *options,
                "--best" if "and" in options[1] else "--print",
                "--export",
                str(file),
            ]
        )
        == 0
    )
    if ending == "jsonl":
        found = [sample.response for sample in read_samples(file)]
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(file).to_pydict()
        found = table["response"]
        assert table["spans"] == [[[len(response), 3]] for response in found]
    assert [response for response in found if response != "x"] == responses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "reward"], "write NAME, one of"),
        (["--where", "reward<x"], "`x` is no number"),
        (["--where", "lenght>1"], "there are step, reward"),
        (["--where", "finish>1"], "compare it by = or !="),
        (["--contains", "nowhere"], "none of its"),
        (["--export", "x.csv"], ".jsonl or .parquet"),
    ],
)  # fmt: skip
def test_wrong_wishes_are_told(options, message, run_dir, capsys):
    assert main(["samples", str(run_dir), *options]) == 2
    assert message in capsys.readouterr().err


def pages(run_dir, *keys, width=40, height=12):
    samples = read_samples(run_dir)
    pager = Pager(samples, width, height)
    for key in keys:
        pager.press(key)
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(pager.screen(), end="")
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    return pager, lines


def test_the_pager_goes_by_keys(run_dir):
    pager, lines = pages(run_dir)
    assert lines[0].startswith(pager.samples[0].heading())
    assert pages(run_dir, "n")[0].place == 1
    assert pages(run_dir, "n", "left", "left")[0].place == 0
    later, _ = pages(run_dir, "]")
    assert later.sample.step == 2
    assert pages(run_dir, "]", "[")[0].sample.step == 1
    worst, lines = pages(run_dir, "f", "f")
    assert "worst" in worst.sample.chosen and "1/2 worst" in "".join(lines)
    assert pages(run_dir, *"/firstX", "backspace", "enter")[0].sample.response == "first"
    assert pages(run_dir, *"/q", "escape")[0].is_done is False
    assert [pages(run_dir, *"c" * n)[0].colours.by for n in range(4)] == [
        "version",
        "reward",
        "right",
        "nothing",
    ]
    assert pages(run_dir, "q")[0].is_done
    legends = [pages(run_dir, *"c" * n, width=80)[1][-2].partition("colours by ")[2] for n in range(4)]
    assert legends == ["version 3", "reward 0 1", "right 0 1", "nothing"]


def test_the_pager_scrolls_through_a_long_response(tmp_path):
    words = " ".join(f"w{i}" for i in range(300))
    with SamplesWriter(tmp_path, text) as writer:
        writer.write(Batch(0, 0, 0, (Group(0, 0, [trajectory(1.0, words)]),)))
    pager, lines = pages(tmp_path, "page down", "page down", "up")
    assert pager.top == 2 * pager.room - 1
    _, lines = pages(tmp_path, "G")
    assert "w299" in "".join(lines)
    assert pages(tmp_path, "G", "g")[0].top == 0
    pager, lines = pages(tmp_path, *"/w250", "enter")
    assert pager.top > 20 and "w250" in "".join(lines)
    styles = [(span.style, line.plain) for line in pager.lines() for span in line.spans]
    assert "reverse" not in dict(styles)  # the match is shown so, and nothing is kept of it


def test_a_search_goes_on_and_says_where_it_ends(run_dir):
    first, lines = pages(run_dir, *"/FIRST", "enter")
    assert (first.sample.response, first.top) == ("first", 0) and "ab" in lines[3]  # it was in sight
    assert first.screen().renderables[first.found_at[1] + 3].spans[-1].style == "reverse"
    again, _ = pages(run_dir, *"/first", "enter", "N")
    assert again.sample.response == "first" and again.place != first.place
    assert pages(run_dir, *"/first", "enter", "N", "N")[0].place == first.place
    nowhere, lines = pages(run_dir, *"/nowhere", "enter", width=80)
    assert lines[-1] == "nowhere is in no other line of these samples"
    assert nowhere.place == 0 and "q quit" in pages(run_dir, *"/nowhere", "enter", "c", width=80)[1][-1]


@pytest.mark.slow
def test_the_command_pages_on_a_terminal_and_leaves_it_as_it_was(run_dir):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncrl.cli.main", "samples", str(run_dir)],
        stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "screen-256color"},
    )  # fmt: skip
    shown = b""
    for wanted, key in ((b"step 2", b"\x1b[D"), (b"step 1", b"q")):
        while wanted not in shown:
            assert select.select([master], [], [], 120)[0], shown
            shown += os.read(master, 65536)
        os.write(master, key)
        shown = b""
    deadline_s = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline_s:
        if select.select([master], [], [], 0.05)[0]:  # its end shows in `poll` alone: the terminal stays open
            shown += os.read(master, 65536)
    assert process.wait(0) == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
