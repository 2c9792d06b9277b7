"""docs/python.md has all that `import asyncrl` gives, with its signature; its examples run."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncrl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M))


def test_every_name_has_a_section_and_no_other():
    assert sorted(SECTIONS) == sorted(asyncrl.__all__)
    assert set(asyncrl.__all__) <= set(dir(asyncrl))


@pytest.mark.parametrize("name", [n for n in asyncrl.__all__ if inspect.isfunction(getattr(asyncrl, n))])
def test_a_function_has_its_signature(name):
    signature = inspect.signature(getattr(asyncrl, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert f"```\n{name}{inspect.Signature(bare)}\n```" in SECTIONS[name]


@pytest.mark.parametrize("name", ["RunResult", "Evaluation", "Sample"])
def test_what_a_result_holds_is_told(name):
    fields = inspect.get_annotations(getattr(asyncrl, name))
    assert [field for field in fields if f"`{field}`" not in SECTIONS[name]] == []


def test_importing_it_loads_neither_torch_nor_a_config():
    light = "import sys, asyncrl; assert not {'torch', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", light], check=True, timeout=60)


@pytest.mark.slow
def test_the_examples_run_in_order(run_script, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)))
    printed = run_script(script)
    assert "runs/python/checkpoints/step_4/hf" in printed
    assert "run.stepz" in printed
    assert len(asyncrl.read_metrics(tmp_path / "runs" / "python" / "metrics.jsonl")) == 6
