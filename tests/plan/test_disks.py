"""Disks and shared memory that a run cannot write to, on real ones: told before any process starts."""

import json
import os
import subprocess
import sys

import pytest

from asyncrl.cli import launch


@pytest.fixture
def run_file(tiny_folder, tmp_path, monkeypatch):
    """`run_file(section={key: value})`: a small run's config, as a file in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(**sections):
        tree = {
            "model": {"path": str(tiny_folder)},
            "data": {"path": str(tiny_folder / "prompts.jsonl")},
            "rollout": {"max_new_tokens": 8},
            "trainer": {"batch_groups": 4},
            "reward": {"functions": [{"function": f"{tiny_folder / 'rewards.py'}:letter_share"}]},
        }
        for name, settings in sections.items():
            tree[name] = {**tree.get(name, {}), **settings}
        (tmp_path / "run.yaml").write_text(json.dumps(tree))
        return tmp_path / "run.yaml"

    return write


NOBODY = "~no-such-user/x"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"run": {"dir": NOBODY}}, "run.dir"),
        ({"run": {"root": NOBODY}}, "run.root"),
        ({"model": {"path": NOBODY}}, "model.path"),
        ({"data": {"path": NOBODY}}, "data.path"),
        ({"reference": {"path": NOBODY}}, "reference.path"),
        ({"critic": {"path": NOBODY}, "objective": {"advantage": "gae"}}, "critic.path"),
        ({"reward": {"models": [{"path": NOBODY, "device": "cpu"}]}}, "reward.models.0.path"),
        ({"reward": {"functions": [{"function": f"{NOBODY}.py:f"}]}}, f"reward function `{NOBODY}.py:f`"),
        ({"objective": {"policy_loss": f"{NOBODY}.py:f"}}, f"`{NOBODY}.py:f`"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_nobody_s_home_folder_is_told_wherever_a_path_is_taken(sections, key, dry_run, run_file, capsys):
    assert launch.main(["--config", str(run_file(**sections)), "--gpus", "0", *dry_run]) == 2
    message = capsys.readouterr().err
    line = next(
        line for line in message.splitlines() if "no user here has the home folder ~no-such-user" in line
    )
    assert key in line
    assert "Traceback" not in message


def test_nobody_s_home_folder_holds_no_run(run_file, capsys):
    assert launch.main(["--resume", NOBODY]) == 2
    assert f"--resume {NOBODY}: no user here has the home folder ~no-such-user" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["dir", "root"])
def test_a_run_directory_below_a_file(key, run_file, capsys):
    config = run_file(run={key: "run.yaml/runs"})
    assert launch.main(["--config", str(config), "--gpus", "0"]) == 2
    message = capsys.readouterr().err
    assert f"run.{key}=run.yaml/runs: " in message
    assert "run.yaml is a file, not a folder" in message


def test_a_folder_for_servers_that_cannot_be_made(run_file, capsys):
    http = {"urls": ["http://127.0.0.1:9"], "weights_dir": str(run_file()) + "/below"}
    config = run_file(rollout={"engine": "http", "http": http})
    assert launch.main(["--config", str(config), "--gpus", "0"]) == 2
    assert f"rollout.http.weights_dir={http['weights_dir']}: " in capsys.readouterr().err


def can_mount() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def launch_with(run_file, tmp_path):
    """`launch_with("MOUNT OPTIONS", ...)`: what a run of a process says that has these disks of its own."""
    if not can_mount():
        pytest.skip("only who may mount disks can make them read-only")
    config = run_file()
    (tmp_path / "runs").mkdir()

    def start(*mounts):
        steps = [f"mount -t tmpfs {options}" for options in mounts]
        steps.append(f"exec {sys.executable} -m asyncrl.cli.launch --config {config} --gpus 0")
        command = ["unshare", "--mount", "sh", "-c", " && ".join(steps)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return start


@pytest.mark.slow
def test_disks_that_are_read_only(launch_with):
    message = launch_with("-o ro none /dev/shm", "-o ro none runs")
    assert "/dev/shm: the weights go from the trainer to the engines through files in it, and" in message
    assert "runs (its disk is read-only); choose another place" in message


@pytest.mark.slow
def test_a_disk_without_room_for_the_run_directory(launch_with):
    assert "No space left on device; free some space" in launch_with("-o size=4k none runs")
