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
