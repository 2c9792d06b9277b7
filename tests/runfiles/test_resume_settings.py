"""What an interrupted run may be continued with."""

import pytest

from asyncrl.config import dump
from asyncrl.errors import ConfigError
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.resume import check_settings


def test_groups_that_have_no_greedy_response_are_not_continued_with_one(make_config, tmp_path):
    """The other way round, nobody asks for it any more."""
    plain = make_config("objective.advantage=rloo")
    greedy = make_config("objective.advantage=remax", "rollout.choose=greedy_baseline")
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text(dump(plain))
    check_settings(plain, run_dir)
    with pytest.raises(ConfigError, match=r"rollout\.choose='greedy_baseline': the run in .* with 'first'"):
        check_settings(greedy, run_dir)
    run_dir.config.write_text(dump(greedy))
    check_settings(greedy, run_dir)
    check_settings(plain, run_dir)
