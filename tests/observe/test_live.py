"""The live view on a real pseudo-terminal, and on a plain stream."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import tty

import pytest
from rich.console import Console

from asyncrl.observe.live import LiveView, NotebookView
from asyncrl.observe.panel import sample_panel
from asyncrl.observe.progress import RunProgress, scores
from asyncrl.observe.samples import Sample


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def append(tmp_path):
    def append(*lines) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    return append


@pytest.fixture
def plain(tmp_path, clock):
    """A view that writes to a stream, and a function that gives the lines written since it was last
    called."""
    stream = io.StringIO()

    def view(total_steps: int) -> LiveView:
        return LiveView(tmp_path, total_steps, 4, Console(file=stream, force_terminal=True), clock)

    def lines() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text.splitlines()

    return view, lines


def steps_in(lines: list[str]) -> list[int]:
    return [int(m[1]) for line in lines if (m := re.match(r"step +(\d+)/", line))]


@pytest.mark.parametrize("total", [1, 7, 25, 60, 1000])
def test_plain_lines_tell_the_first_the_last_and_some_steps_between(plain, append, make_line, total):
    make_view, lines = plain
    view = make_view(total)
    view.start()
    for step in range(1, total + 1):
        append(make_line(step))
        view.poll("training")
    view.stop()
    written = lines()
    told = steps_in(written)
    assert told[0] == 1 and told[-1] == total
    assert told == sorted(set(told))
    assert min(total, 20) <= len(told) <= 30
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "\n".join(written))
    assert "\n".join(written).isascii()


def test_a_plain_line_says_what_matters(plain, append, make_line, clock):
    make_view, lines = plain
    view = make_view(100)
    view.start()
    append(make_line(1), make_line(2))
    clock.now_s += 65
    view.poll()
    append(make_line(4))
    view.poll()
    assert lines()[-1] == (
        "step   4/100  reward 0.340  staleness 1.25 (max 3)  tok/s 3,004 generated 2,500 trained"
        "  idle 12% trainer 25% rollout  1:05, 3:12 left"
    )


def test_the_newest_scores_of_an_evaluation_stay_in_sight(tmp_path, terminal, append, make_line, clock):
    """Those of rounds that are done late, too, and of names that are no text for a terminal."""
    results, stream = tmp_path / "results.jsonl", io.StringIO()
    consoles = terminal.console, Console(file=stream, force_terminal=True)
    views = [LiveView(tmp_path, 5, 4, console, clock, results=results) for console in consoles]
    for view in views:
        view.start()
    append(make_line(1))
    results.write_text('{"version": 3, "metrics": {"eval/aime25/reward/mean": 0.25}}\n{"version"\n')
    for view in views:
        view.poll()
    scored = {"eval/aime25/reward/mean": 0.5, "eval/aime25/reward/right/mean": 0.1, "eval/\nb/reward/mean": 1}
    with results.open("a") as file:
        file.write(json.dumps({"version": 5, "metrics": scored, "seconds": 1.0}) + "\n")
    append(make_line(5))
    for view in views:
        view.stop()
    told = "aime25 0.500,  b 1.000 (version 5)"
    assert f"evaluation   {told}" in without_escapes(terminal.written())
    first, last = stream.getvalue().splitlines()[1:]
    assert "  evaluation aime25 0.250 (version 3)  idle 12%" in first
    assert f"  evaluation {told}  idle 12%" in last
    assert scores(7, {"eval/aime25/failed_prompts": 30}) == "nothing scored (version 7)"


def test_an_interrupted_run_ends_with_its_last_step(plain, append, make_line):
    make_view, lines = plain
    view = make_view(1000)
    view.start()
    append(*(make_line(step) for step in range(1, 48)))
    view.stop()
    assert steps_in(lines()) == [1, 40, 47]


def test_a_status_is_told_when_it_changes_but_not_in_floods(plain, clock, append, make_line):
    make_view, lines = plain
    view = make_view(3)
    view.start()
    lines()
    view.poll("waiting for engines: 1 s")
    view.poll("waiting for engines: 1 s")
    clock.now_s += 1
    view.poll("waiting for engines: 2 s")
    assert lines() == ["0:00  waiting for engines: 1 s"]
    clock.now_s += 5
    view.poll("waiting for engines: 7 s")
    assert lines() == ["0:06  waiting for engines: 7 s"]
    clock.now_s += 50
    append(make_line(1))
    view.poll("training")
    assert [line[:8] for line in lines()] == ["step 1/3"]  # between steps, a status says nothing new
    append(make_line(3))
    view.poll("computing the last step")  # which is older than the step's line
    assert lines()[-1].startswith("step 3/3")
    clock.now_s += 1
    view.poll("saving the model")
    assert lines() == ["0:57  saving the model"]


def test_a_run_that_is_gone_on_with_tells_its_start_but_not_its_past(plain, append, make_line, clock):
    make_view, lines = plain
    append(*(make_line(step, warnings=["reward timed out"]) for step in range(1, 8)))
    view = make_view(100)
    view.start()
    view.poll("trainer-0: reading the newest checkpoint")
    assert lines()[1:] == ["0:00  trainer-0: reading the newest checkpoint"]
    append(make_line(8))
    clock.now_s += 60
    view.poll("trainer-0: waiting for the batch of step 8")
    assert steps_in(lines()) == [8]


def test_events_and_warnings_are_told_on_one_line_without_control_characters(plain, append, make_line, clock):
    make_view, lines = plain
    view = make_view(100)
    view.start()
    lines()
    clock.now_s += 3
    view.event("worker 0 died:\n\x1b[31mTraceback\x07")
    append(make_line(1, warnings=["reward timed out"]))
    view.poll()
    told = lines()
    assert told[0] == "0:03  worker 0 died:  [31mTraceback "
    assert told[2] == "0:03  reward timed out"


def test_text_beyond_the_streams_encoding_does_not_end_the_run(tmp_path):
    raw = io.BytesIO()
    view = LiveView(tmp_path, 5, 4, Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True)))
    view.start()
    view.event("naïve – reward")
    assert "na?ve ? reward" in raw.getvalue().decode("ascii")


def test_a_closed_pipe_silences_the_view_and_lets_the_run_go_on(tmp_path, append, make_line):
    reader, writer = os.pipe()
    view = LiveView(tmp_path, 5, 4, Console(file=os.fdopen(writer, "w")))
    view.start()
    os.close(reader)
    append(make_line(1), make_line(2))
    view.poll("training")
    view.event("something")
    view.stop()


class Terminal:
    """The far end of a pseudo-terminal of 80 by 24 that shows what is typed, and output as it is."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        modes = termios.tcgetattr(slave)
        modes[tty.LFLAG] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        termios.tcsetwinsize(slave, (24, 80))
        os.set_blocking(self._master, False)
        self._modes = termios.tcgetattr(slave)
        self._file = self.file = os.fdopen(slave, "w", encoding=encoding)
        self.console = Console(file=self._file, _environ={"TERM": "xterm-256color", "COLUMNS": "80"})

    def written(self) -> str:
        """What came since the last call."""
        parts = []
        while True:
            try:
                parts.append(os.read(self._master, 65536))
            except BlockingIOError:
                return b"".join(parts).decode()

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def has_its_modes(self) -> bool:
        return termios.tcgetattr(self.file) == self._modes

    def hang_up(self) -> None:
        os.close(self._master)

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.close()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_on_a_terminal_a_panel_shows_the_run(tmp_path, terminal, clock, append, make_line):
    view = LiveView(tmp_path, 50, 4, terminal.console, clock)
    view.start()
    clock.now_s += 1
    view.poll("waiting for the first batch")
    assert "waiting for the first batch" in without_escapes(terminal.written())
    append(*(make_line(step) for step in range(1, 11)))
    clock.now_s += 59
    view.poll()
    shown = without_escapes(terminal.written())
    for part in (
        tmp_path.name[:20],
        "step 10/50",
        "1:00 elapsed, 1:20 left",
        "0.400",
        "+0.090 since the start",
        "3,010 tok/s",
        "13.5 tokens a response",
        "max 3, bound 4",
        "12%",
        "25%",
        "pause 4.0 ms",
        "160 trained, 32 in flight, 5 dropped, 3 failed",
        "▁▂▃▃▄▅▆▆▇█",
    ):
        assert part in shown, part
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", shown))
    assert "waiting" not in shown
    clock.now_s += 1
    view.poll("waiting for groups")
    assert "waiting" not in without_escapes(terminal.written())  # between steps, it would say nothing new
    clock.now_s += 39
    view.event("worker 0 restarted")
    view.poll("waiting for groups")
    shown = without_escapes(terminal.written())
    assert "1:40  worker 0 restarted" in shown
    assert "no step has ended for 0:40: waiting for groups" in shown
    view.stop()
    assert terminal.written().endswith("\x1b[?25h")  # the cursor is back


def test_a_key_shows_the_last_sample_and_takes_it_away(tmp_path, terminal, clock, append, make_line):
    sample = {"step": 7, "chosen": ["best"], "group": 1, "row": 2, "reward": 0.5, "parts": {}, "tokens": 3}
    sample |= {"finish": "stop", "versions": [0, 1], "prompt": "p\n" * 9, "response": "an answer\n" * 99}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    view = LiveView(tmp_path, 50, 4, terminal.console, clock, keys=terminal.file)
    view.start()
    append(make_line(1))
    clock.now_s += 1
    view.poll()
    assert "an answer" not in terminal.written()
    terminal.press("s")
    view.poll()
    shown = without_escapes(terminal.written())
    assert "step 7, best" in shown and "an answer" in shown and "step 1/50" in shown
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", shown))
    for number in range(4):
        view.event(f"worker {number} restarted")
    clock.now_s += 1
    view.poll()
    shown = without_escapes(terminal.written())  # on 24 lines
    assert shown.count("an answer") >= 2 and "│ p " in shown
    assert "worker 3 restarted" in shown and "worker 2 restarted" not in shown
    terminal.press("s")
    view.poll()
    assert "an answer" not in terminal.written()
    view.stop()
    assert terminal.has_its_modes()


IN_A_CELL = """
import json
from asyncrl.observe.live import LiveView, NotebookView
from asyncrl.observe.progress import RunProgress
view = LiveView({folder!r}, 50, 4, now_s=iter(range(0, 1000, 5)).__next__)
view.start()
view.event("<b>a worker died</b>")
view.poll()
view.stop()
"""


@pytest.mark.slow
def test_a_notebook_has_a_panel_that_is_replaced(tmp_path, append, make_line):
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    append(make_line(1))
    manager, client = start_new_kernel(startup_timeout=120)
    shown = []
    try:
        client.execute_interactive(
            IN_A_CELL.format(folder=str(tmp_path)), timeout=120, output_hook=shown.append
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = [message["msg_type"] for message in shown if "display" in message["msg_type"]]
    assert kinds[0] == "display_data" and {*kinds[1:]} == {"update_display_data"}
    assert not [message for message in shown if message["msg_type"] in ("error", "stream")]
    contents = [message["content"] for message in shown if "display" in message["msg_type"]]
    assert len({content["transient"]["display_id"] for content in contents}) == 1
    last = contents[-1]["data"]["text/html"]
    assert "&lt;b&gt;a worker died&lt;/b&gt;" in last
    assert "trained" in last


def test_a_panel_in_html_is_replaced_and_its_texts_are_texts(make_line):
    shown = []

    def display(html):
        shown.append(("new", html))
        return lambda html: shown.append(("replaced", html))

    progress = RunProgress("<i>a</i>", 50, 4, 0.0)
    view = NotebookView(display, progress)
    view.start()
    progress.add(make_line(1), 5.0)
    view.event("<b>a worker died</b>", 5.0)
    view.stop(5.0)
    (first, _), *later = shown
    assert (first, {kind for kind, _ in later}) == ("new", {"replaced"})
    last = re.sub("</?(pre|code|span)[^>]*>", "", later[-1][1])
    assert "step 1/50" in last
    assert "&lt;i&gt;a&lt;/i&gt;" in last and "&lt;b&gt;a worker died&lt;/b&gt;" in last
    assert "<" not in last


def test_polling_often_draws_seldom(tmp_path, terminal, clock):
    view = LiveView(tmp_path, 50, 4, terminal.console, clock)
    view.start()
    terminal.written()
    for _ in range(100):
        clock.now_s += 0.001
        view.poll("waiting")
    assert terminal.written() == ""
    clock.now_s += 1
    view.poll("waiting")
    assert terminal.written() != ""
    view.stop()


def test_a_lost_terminal_lets_the_run_go_on(tmp_path, clock, append, make_line):
    terminal = Terminal()
    view = LiveView(tmp_path, 50, 4, terminal.console, clock)
    view.start()
    terminal.hang_up()
    append(make_line(1))
    clock.now_s += 1
    view.poll("training")
    view.stop()


@pytest.mark.parametrize("width", [1, 4, 5])
def test_a_terminal_may_become_narrow(width):
    sample = Sample(1, ["best"], 1, 2, 0.5, {}, 3, "stop", (0, 1), "p\n" * 9, "an answer")
    Console(file=io.StringIO(), width=width).print(sample_panel(sample, width, 9))


def test_a_run_goes_on_where_it_cannot_be_shown(plain, append, make_line, caplog):
    view = plain[0](10)
    view.start()
    append(make_line(1), ["no line of metrics"], make_line(2))
    view.poll("training")
    view.poll("training")
    view.stop()
    assert "line 2, is not a line of metrics" in caplog.text
    assert caplog.text.count("the run goes on, but is shown no more") == 1


def test_a_terminal_that_was_too_slow_once_gets_its_modes_back(tmp_path, terminal, clock):
    view = LiveView(tmp_path, 50, 4, terminal.console, clock, keys=terminal.file)
    view.start()
    assert not terminal.has_its_modes()
    os.set_blocking(terminal.file.fileno(), False)  # as another process may have it
    for _ in range(200):
        clock.now_s += 1
        view.poll("training")
    terminal.written()
    view.stop()
    assert terminal.has_its_modes()


@pytest.mark.parametrize("reason", ["dumb", "ascii"])
def test_terminals_that_cannot_show_the_panel_get_plain_lines(tmp_path, reason):
    terminal = Terminal("ascii" if reason == "ascii" else "utf-8")
    if reason == "dumb":
        terminal.console = Console(file=terminal.console.file, _environ={"TERM": "dumb"})
    view = LiveView(tmp_path, 50, 4, terminal.console)
    view.start()
    view.stop()
    written = terminal.written()
    assert written.startswith("AsyncRL ") and "\x1b" not in written
    terminal.close()


def test_watching_needs_no_torch():
    code = "import asyncrl.observe.live, asyncrl.observe.summary, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
