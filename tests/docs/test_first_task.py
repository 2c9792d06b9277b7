"""docs/first-task.md, typed word for word by somebody who has cloned the repository: it runs, and the model
learns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked_programs
import pytest

from asyncrl.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-task.md"
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M)
SHOWN_ONLY = "text"
"""The language of blocks that show what is printed."""


def script(page):
    """What the reader does: commands are typed, other blocks are saved under the last name before them."""
    lines = ["set -euo pipefail"]
    for number, block in enumerate(BLOCK.finditer(page), 1):
        lines.append(f"echo '== block {number}'")
        if block["language"] == "sh":
            lines.append(block["text"])
        elif block["language"] != SHOWN_ONLY:
            name = re.findall(r"`([\w.]+)`", page[: block.start()])[-1]
            lines.append(f"cat > {name} <<'END OF {name}'\n{block['text']}END OF {name}")
    return "\n".join(lines)


@pytest.fixture
def clone(tmp_path, warmed_up_model):
    """A clone in which `make install` and `asyncrl tiny-model` have been typed before: both find their work
    done. Its commands are forked."""
    for name in ("Makefile", "pyproject.toml", "asyncrl"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(warmed_up_model)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    commands = tmp_path / "commands"
    commands.mkdir()
    (programs / "activate").write_text(f"export PATH={commands}:{Path(sys.executable).parent}:$PATH\n")
    for stamp in (programs / "python", programs.parent / ".torch", programs.parent / ".core"):
        stamp.touch()
    with forked_programs.programs(commands):
        yield tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_as_written_and_its_model_learns(clone):
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("```") == 2 * len(BLOCK.findall(page))  # none is left out
    done = subprocess.run(
        ["bash", "-c", script(page)],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = clone / "descending" / "runs" / "first"
    rewards = [line["reward/mean"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(rewards) == 75
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[50:60]) / 10 > 0.4
    before, after = json.loads((clone / "descending" / "eval.json").read_text())
    assert after["reward_mean"] - before["reward_mean"] > 0.25
    assert "[1.0, 0.0]" in done.stdout
    assert "sort " in done.stdout.partition("step 1, best")[2]  # prompt and response were shown
    assert (run / "checkpoints" / "step_75" / "hf").is_dir()
