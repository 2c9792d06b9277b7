"""`asyncrl SUBCOMMAND`."""

import pytest

from asyncrl.cli.main import main
from asyncrl.tiny import COMPLETE


def test_a_subcommand_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "SUBCOMMAND" in capsys.readouterr().err


def test_help_names_the_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert "tiny-model" in output
    assert "config-docs" in output


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["tiny-model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("asyncrl tiny-model: ")
    assert COMPLETE in error
    assert (tmp_path / "thesis.txt").exists()


def test_only_a_run_is_merged(tmp_path, capsys):
    assert main(["merge", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err == f"asyncrl merge: {tmp_path}: no run: it has no config.yaml; name the folder of a run\n"


def test_a_guest_says_how_many_episodes_it_carries_out_and_is_no_scorer_as_well(capsys):
    assert main(["join", "join", "--episodes", "0"]) == 2
    assert "--episodes 0: say how many at a time, 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["join", "join", "--episodes", "2", "--scores", "judge"])
    assert "not allowed with argument" in capsys.readouterr().err
