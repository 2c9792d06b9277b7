"""`--dry-run`: everything is checked and shown, nothing is started."""

import io

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.cli import launch
from asyncrl.cli.dry_run import show
from asyncrl.config import load
from asyncrl.config.yaml_tree import read
from asyncrl.plan.machine import Machine
from asyncrl.plan.preflight import plan


@pytest.fixture
def shown(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "--gpus", "0", "run.name='[red]'"]) == 0
    return capsys.readouterr().out


def lines_of(text):
    return {" ".join(line.split()) for line in text.splitlines()}


def test_the_resolved_settings_can_be_copied_into_a_file(shown, run_files):
    settings = shown.split("(all: --verbose)\n")[1].split("\nwarning:")[0]
    (run_files / "copied.yaml").write_text(settings)
    assert load("copied.yaml") == load("run.yaml", ["run.name='[red]'"])
    assert read(run_files / "copied.yaml")["run"] == {"name": "[red]", "steps": 10}


def test_all_settings_are_shown_on_request(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "--verbose", "--gpus", "0"]) == 0
    settings = capsys.readouterr().out.split("\nSettings\n")[1].split("\nwarning:")[0]
    (run_files / "copied.yaml").write_text(settings)
    assert load("copied.yaml") == load("run.yaml")
    assert read(run_files / "copied.yaml")["network"] == {"bind": "127.0.0.1", "advertise": None}


def test_what_the_settings_imply_is_told(shown):
    assert {
        "rollout 1 thread CPU",
        "trainer 1 thread CPU",
        "responses a step 32 (8 groups of 4)",
        "response tokens a step at most 1,024",
        "optimizer updates a step 2 of 4 groups, 20 in all",
        "staleness of a trained token at most 3 versions (on_stale: wait)",
        "the same in optimizer updates at most 6",
        "groups outstanding at most 32, 128 responses",
        "responses decoding at once at most 16 in 16 slots",
        "prompts 20 usable rows, the longest of 6 tokens",
        "epochs 4.00",
        "rows.jsonl:21: not JSON: Expecting value at column 2",
        "warning: 1 bad row of rows.jsonl skipped",
        "dry run: nothing was started",
    } <= lines_of(shown)
    assert "(1: generation_config.json, config.json), <|im_end|> (258: tokenizer, chat" in " ".join(
        shown.split()
    )
    assert "KV cache 311.3 kB" in " ".join(shown.split())  # 16 slots of 6 + 32 tokens of 512 bytes


@pytest.mark.parametrize(
    ("own_cores", "pin_cores", "told"),
    [
        ((4, 5), "never", "cores shared by all (placement.pin_cores=never)"),
        ((), "auto", "cores shared by all: this system cannot reserve cores"),
        ((4, 5), "auto", "cores shared by all: one per thread would take 4, and there are 2"),
        ((4, 5, 6, 7), "auto", "cores each computing process has its own"),
        ((4, 5, 6, 7), "auto", "rollout 3 threads CPU, cores 5, 6, 7"),
        ((4, 5, 6, 7), "auto", "trainer 1 thread CPU, core 4"),
    ],
)
def test_how_the_cores_are_shared_out_is_told(run_files, capsys, monkeypatch, own_cores, pin_cores, told):
    machine = Machine(4, 10**10, (), None, own_cores)
    monkeypatch.setattr("asyncrl.plan.preflight.probe", lambda: machine)
    overrides = [f"placement.pin_cores={pin_cores}", "rollout.threads=3"]
    assert launch.main(["--config", "run.yaml", "--dry-run", *overrides]) == 0
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_model_that_is_not_packed_is_told_with_the_reason(run_files):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 259, "num_hidden_layers": 1}
    config = AutoConfig.for_model("qwen3_5_text", layer_types=["linear_attention"], **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    console = Console(file=io.StringIO(), width=200)
    show(plan(load("run.yaml"), 0), console)
    assert (
        "sequences of the policy not packed: its layers of kind linear_attention would mix sequences that "
        "share a row, so each has a row of its own"
    ) in lines_of(console.file.getvalue())


def test_nothing_is_started_or_written(shown, run_files):
    assert not (run_files / "runs").exists()


def test_what_is_no_terminal_gets_no_control_characters(shown):
    assert "\x1b" not in shown


def test_a_narrow_terminal_cuts_nothing(run_files):
    narrow = io.StringIO()
    show(plan(load("run.yaml"), 0), Console(file=narrow, width=60, force_terminal=True))
    assert "…" not in narrow.getvalue()


def test_a_config_that_cannot_run_is_refused_all_the_same(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "rollout.max_new_tokens=4000"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "use at most rollout.max_new_tokens=2042" in output.err


def test_what_is_known_without_the_model_is_shown_with_what_is_lacking(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "--gpus", "0", "model.path=./none"]) == 0
    output = capsys.readouterr().out
    assert {
        "responses a step 32 (8 groups of 4)",
        "prompts 20 rows, not tokenised",
        "epochs 4.00",
    } <= lines_of(output)
    assert "config.json is enough" in output
    folder = run_files / "none"
    (line,) = output.partition("What this machine lacks\n")[2].splitlines()[:-1]
    assert line == (
        f"- model.path=./none: there is no folder {folder}; model.path=FOLDER, or a name on the hub"
    )


PLANNED = ["--config", "run.yaml", "--dry-run", "--gpus", "128"]


def test_gpus_that_the_machine_has_not_are_planned_for(run_files, capsys):
    for file in ("model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json"):
        (run_files / file).unlink()
    assert launch.main([*PLANNED, "rollout.workers=2"]) == 0
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert "planned for 128 GPUs of 80.0 GB" in lines
    assert "GPUs (planned for: this machine does not have them)" in lines
    assert "trainer 1 thread GPU 0" in lines
    assert "2 × rollout 1 thread each GPU 1, 2" in lines
    (trainer,) = (line for line in lines if line.startswith("GPU 0 trainer-0"))
    assert trainer.endswith("of 80.0 GB")
    text = " ".join(output.split())
    lacking = text.partition("What this machine lacks")[2]
    assert "- --gpus 128: this machine has" in lacking
    assert "- model.path=model: the folder has a config.json but no weights" in lacking
    assert "- model.path=model: no tokenizer could be loaded" in lacking
    assert "125 of the GPUs asked for stay idle" in text


def test_a_plan_needs_neither_model_nor_data_nor_engine(run_files, capsys):
    gone = ["model.path=./none", "data.path=none.jsonl", "reward.functions.0.function=none.py:f"]
    assert launch.main([*PLANNED, *gone, "run.root=/proc/none"]) == 0
    output = capsys.readouterr().out
    assert "trainer-0 unknown of 80.0 GB" in " ".join(output.split())
    assert {"prompts unknown, of at most 1,024 tokens", "epochs unknown", "steps 10"} <= lines_of(output)
    for name in ("./none: there is no folder", "none.jsonl: there is no such file", "`none.py:f`"):
        assert name in " ".join(output.split())


def test_a_plan_is_refused_for_what_is_wrong_anywhere(run_files, capsys):
    wrong = [*PLANNED, "reward.functions.0.function=rewards.py:lenght", "model.path=./none"]
    assert launch.main(wrong) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "did you mean `length`?" in output.err
    assert "model.path=./none" in output.err


def test_gpus_that_the_machine_has_not_start_nothing(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--gpus", "128"]) == 2
    assert "or add --dry-run to plan for 128" in capsys.readouterr().err
    assert not (run_files / "runs").exists()
