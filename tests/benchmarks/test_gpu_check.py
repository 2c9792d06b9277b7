"""The check for a first hour on a GPU, in small on the CPU: the same steps, but for what only a GPU has."""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

CHECK = Path(__file__).parents[2] / "benchmarks" / "gpu_check"
SMALL = ("--device", "cpu", "--small")


def numbers(out, step):
    """The medians of a step that has gone well."""
    found = json.loads(out.read_text())["steps"][step]
    assert found["verdict"] == "ok", found
    return {n["what"]: sorted(n["values"])[len(n["values"]) // 2] for n in found["numbers"]}


@pytest.fixture
def parts(monkeypatch):
    """The modules of the check, which lie in a folder of their own."""
    monkeypatch.syspath_prepend(CHECK)
    import check_report
    import check_runner
    import check_step

    return check_step, check_runner, check_report


@pytest.mark.slow
def test_steps_measure_and_compare_and_are_not_repeated(run_script, tmp_path):
    check = partial(run_script, CHECK, *SMALL, forks=True)
    out = tmp_path / "results.json"
    check("--out", out, "--steps", "memory-06b", "attention", "weights", "broadcast", "engine")
    assert numbers(out, "memory-06b")["the plan"] > 0
    assert numbers(out, "attention")["trained with sdpa"] > 0
    assert numbers(out, "weights")["publish: from the device, with checksums"] > 0
    assert numbers(out, "broadcast")["take, verified"] > 0
    engine = numbers(out, "engine")
    for how in ("single kernels", "padded shapes"):
        assert engine[f"generated, {how}"] > 0
        assert engine[f"pause, {how}"] > 0
        assert engine[f"log-probabilities apart, {how}"] < 1e-4
    before = out.read_text()
    again = check("--out", out, "--steps", "memory-06b", "engine")
    assert again.count("done before (ok)") == 2
    assert json.loads(out.read_text()) == json.loads(before)
    sent = tmp_path / "results_to_send.json"
    assert f"to send: {sent}" in again
    report = json.loads(sent.read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["steps"]["engine"]["numbers"]


def test_a_step_ends_with_a_verdict_whatever_happens(parts, tmp_path, capfd):
    check_step, check_runner, check_report = parts
    results = check_report.Results.open(tmp_path / "out" / "results.json", "cpu", True)

    def measure(bench):
        bench.found("speed", "m/s", 1.0, 3.0, 2.0, predicted=(5.0, None), anywhere=True)

    def fail(bench):
        measure(bench)
        raise OSError(f"no room in {tmp_path}")

    def lack(bench):
        raise check_step.NotThere("no such package")

    verdicts = {}
    for run in (measure, fail, lack):
        arguments = argparse.Namespace(device="cpu", small=True, child=tmp_path / "result.json")
        check_runner.run_here(check_step.Step(run.__name__, "", run), None, arguments)
        results.keep(run.__name__, check_step.Result.from_json(arguments.child.read_text()))
        verdicts[run.__name__] = (results.steps[run.__name__].verdict, results.steps[run.__name__].reason)
    assert verdicts == {
        "measure": ("outside prediction", ""),
        "fail": ("failed", f"OSError: no room in {tmp_path}"),
        "lack": ("not there", "no such package"),
    }
    assert "no room in" in capfd.readouterr().err
    results.log("fail").parent.mkdir()
    results.log("fail").write_text(f"at /home/somebody/x.py, {tmp_path}")
    steps = {name: check_step.Step(name, name, measure) for name in verdicts}
    sent = check_report.write_report(results, steps).read_text()
    assert json.loads(sent)["steps"]["fail"]["numbers"][0]["values"] == [1.0, 3.0, 2.0]
    assert "somebody" not in sent
    assert str(tmp_path) not in sent
    with pytest.raises(SystemExit, match="results of another check"):
        check_report.Results.open(results.path, "cuda", False)


def test_a_step_that_does_not_end_is_killed(parts, tmp_path):
    check_step, check_runner, _ = parts
    step = check_step.Step("engine", "", lambda bench: None, deadline_s=0.1)
    arguments = argparse.Namespace(device="cpu", small=True)
    result = check_runner.run_alone(step, tmp_path / "log", tmp_path, arguments)
    assert (result.verdict, result.reason) == ("failed", "it has not ended within 0.1 s and was killed")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.deepspeed
def test_deepspeed_and_vllm_are_checked_as_on_a_gpu(run_script, import_vllm, tmp_path):
    out = tmp_path / "results.json"
    run_script(CHECK, *SMALL, "--out", out, "--steps", "deepspeed-2", "vllm-updates", forks=True)
    assert numbers(out, "deepspeed-2")["gradient norm apart from plain torch's"] < 1e-4
    updates = numbers(out, "vllm-updates")
    assert updates["log-probabilities apart, largest mean"] < 1e-4
    assert updates["the same, the engine one version behind"] > 1e-4
    (histogram,) = json.loads(out.read_text())["steps"]["vllm-updates"]["histograms"].values()
    assert sum(count for _, _, count in histogram) == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so_in_a_line():
    ended = subprocess.run([sys.executable, CHECK], capture_output=True, text=True, timeout=800)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "gpu-check: skipped, there is no NVIDIA GPU here that CUDA can use\n"
