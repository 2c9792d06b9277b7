"""The ready-made configs: found by name from any folder, listed, and copied to be edited."""

import pytest

from asyncrl.cli.main import main
from asyncrl.config import load, presets
from asyncrl.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_preset_loads_by_its_name_from_any_folder():
    assert {"quickstart.yaml", "gpu-8.yaml", "grlo.yaml"} <= set(presets.names())
    for name in presets.names():
        assert load(name) == load(name.removesuffix(".yaml")) == load(presets.FOLDER / name)


def test_a_file_in_the_working_folder_comes_first(tmp_path):
    (tmp_path / "grlo.yaml").write_text((presets.FOLDER / "quickstart.yaml").read_text())
    (tmp_path / "gpu-1").mkdir()
    assert load("grlo.yaml") == load(presets.FOLDER / "quickstart.yaml")
    assert load("gpu-1") == load(presets.FOLDER / "gpu-1.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gro.yaml", "no preset of that name; did you mean grlo.yaml?"),
        ("grlo-4gpus", "did you mean grlo-4gpu.yaml?"),
        ("thesis.yaml", "ablation-staleness.yaml, gpu-1.yaml"),
        ("configs/grlo.yaml", "the preset of that name is --config grlo.yaml"),
        ("runs/config.yaml", "cannot read the config file runs/config.yaml: No such file"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, words):
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert words in str(caught.value)


def test_the_list_has_a_line_each(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets.names()
    assert all(line.endswith(".") for line in lines), "each first comment line is a whole sentence"


def test_a_copy_is_never_made_over_a_file(tmp_path, capsys):
    assert main(["configs", "copy", "grlo"]) == 0
    assert (tmp_path / "grlo.yaml").read_text() == (presets.FOLDER / "grlo.yaml").read_text()
    (tmp_path / "grlo.yaml").write_text("mine")
    assert main(["configs", "copy", "grlo.yaml"]) == 2
    assert (tmp_path / "grlo.yaml").read_text() == "mine"
    (tmp_path / "there").mkdir()
    assert main(["configs", "copy", "grlo.yaml", "there"]) == 0
    assert main(["configs", "copy", "grlo.yaml", "mine.yaml"]) == 0
    assert load("mine.yaml") == load("there/grlo.yaml")
    assert main(["configs", "copy", "grlo.yaml", "new/folder/"]) == 0
    assert load("new/folder/grlo.yaml") == load("mine.yaml")
    assert main(["configs", "copy", "grlo.yaml", "mine.yaml/"]) == 2
    assert main(["configs", "copy", "grlo.yaml", "no/such/folder.yaml"]) == 2
    assert main(["configs", "copy", "gro.yaml"]) == 2
    errors = capsys.readouterr().err
    for words in (
        "grlo.yaml already exists",
        "cannot write no/such/folder.yaml",
        "did you mean grlo.yaml?",
    ):
        assert words in errors
