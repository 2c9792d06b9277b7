"""The launcher apart from the run itself: which settings and which directory."""

import resource
from contextlib import contextmanager

import pytest

from asyncrl import config as settings
from asyncrl.cluster.hosts.fork_server import NO_FORK
from asyncrl.errors import ConfigError
from asyncrl.launch import launcher
from asyncrl.launch.checked import Checked
from asyncrl.plan.resources import Place, Placement
from asyncrl.runfiles.layout import SHARED_MEMORY_PREFIX, RunDir
from asyncrl.runfiles.user_files import UserFiles
from asyncrl.weights.shm import segment

TREE = {
    "model": {"path": "m"},
    "data": {"path": "d"},
    "reward": {"functions": [{"function": "a:b"}]},
}


@pytest.mark.parametrize("config", [TREE, settings.from_tree(TREE)], ids=["mapping", "Config"])
def test_overrides_apply_to_every_kind_of_config(config):
    resolved = launcher._resolve(config, ["run.steps=7", "reward.functions.0.weight=2"])
    assert (resolved.run.steps, resolved.reward.functions[0].weight) == (7, 2)
    assert "run" not in TREE
    with pytest.raises(ConfigError, match=r"unknown key `run\.stepz`; did you mean `run\.steps`"):
        launcher._resolve(config, ["run.stepz=7"])
    with pytest.raises(ConfigError, match="give a list"):
        launcher._resolve(config, "run.steps=7")


def test_a_run_goes_on_in_its_directory_whatever_that_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "a run: \N{ROCKET} # 1"
    folder.mkdir()
    RunDir(folder).config.write_text(settings.dump(settings.from_tree(TREE)))
    monkeypatch.setattr(launcher, "_run_resolved", lambda config, *_: config)
    assert launcher.resume(folder).run.dir == str(folder)


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(tmp_path):
    made = [launcher._make_new(tmp_path / "runs" / "run-1") for _ in range(3)]
    assert [path.name for path in made] == ["run-1", "run-1-2", "run-1-3"]


def test_a_directory_holds_one_run_at_a_time(tmp_path):
    with RunDir(tmp_path).held():
        second = RunDir(tmp_path).held()
        with pytest.raises(ConfigError, match="another run is using this directory"):
            second.__enter__()
    with RunDir(tmp_path).held():
        pass


@contextmanager
def largest_file(n_bytes):
    """While the body runs, whoever writes more to a file gets an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_takes_nothing_that_a_run_goes_on_from(tmp_path):
    config = settings.from_tree(TREE | {"run": {"dir": str(tmp_path), "resume": "auto"}})
    checked = Checked(config, bytes(1 << 20), Placement(()), (), {}, UserFiles({}, {}))
    run_dir = RunDir(tmp_path)

    def begins():
        with launcher._held(checked):
            pass

    with largest_file(1 << 19), pytest.raises(ConfigError, match=r"cannot write .*free some space"):
        begins()
    written = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert written == {"config.yaml", ".models", "user_files.json", "usage.json"}
    begins()  # the same run, from its start
    assert run_dir.prompts.stat().st_size == 1 << 20
    with largest_file(100), pytest.raises(ConfigError, match=r"cannot write .*free some space"):
        begins()
    assert settings.load(run_dir.config) == config


def test_what_killed_runs_have_left_in_shared_memory_is_gone_before_that_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "shared_folder", lambda: tmp_path)
    monkeypatch.setattr(segment, "_YOUNG_S", 0.0)
    monkeypatch.setenv(NO_FORK, "1")
    (tmp_path / f"{SHARED_MEMORY_PREFIX}0123456789ab-0").touch()

    def check(*_):
        raise ConfigError(f"there is {[*map(str, tmp_path.iterdir())]}")

    monkeypatch.setattr(launcher, "check", check)
    with pytest.raises(ConfigError, match=r"^there is \[\]$"):
        launcher.run(TREE, progress=False)


@pytest.mark.parametrize(
    ("role", "gpus", "own", "transport", "expected"),
    [
        ("trainer-1", (1,), {}, "shm", "expandable_segments:True"),
        ("trainer-0", (), {}, "shm", None),
        ("rollout-0", (0,), {}, "shm", None),
        ("reward-0", (0,), {}, "shm", None),
        # Other processes map what lies there.
        ("trainer-0", (0,), {}, "ipc", None),
        # The launcher's own environment is the roles', too.
        ("trainer-0", (0,), {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "shm", None),
        ("trainer-0", (0,), {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "shm", None),
    ],
)
def test_trainers_on_gpus_allocate_in_segments_that_grow_unless_told_otherwise(
    role, gpus, own, transport, expected, monkeypatch
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    place = Place(role, "cuda" if gpus else "cpu", gpus, threads=1)
    config = settings.from_tree(TREE | {"weights": {"transport": transport}})
    assert launcher._allocator(place, config).get("PYTORCH_ALLOC_CONF") == expected
