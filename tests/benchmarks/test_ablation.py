"""The ablation's page says what its numbers say, and what it runs is sound. No measurement is judged."""

import re
import runpy
from pathlib import Path

import pytest

from asyncrl.sweep import Sweep
from asyncrl.sweep.folder import SweepFolder
from asyncrl.sweep.sweep import Results, make_design
from asyncrl.sweep.table import Reading, read_kept

ROOT = Path(__file__).parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))
PAGE = ROOT / "docs" / "ablation.md"
EXPERIMENTS = BENCHMARK["EXPERIMENTS"]
MEASURED = [task for task in EXPERIMENTS if BENCHMARK["kept"](task, PAGE, "runs.csv").exists()]


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_the_page_is_written_from_the_numbers_that_are_kept(task):
    text = PAGE.read_text()
    assert text.count(BENCHMARK["_begin"](task)) == 1
    if BENCHMARK["kept"](task, PAGE, "runs.csv").exists():
        assert BENCHMARK["with_report"](text, task, PAGE) == text, (
            "run `python benchmarks/ablation.py --write`"
        )


def test_what_is_said_elsewhere_of_the_ablation_is_on_its_page():
    """Every difference with an interval and a number of pairs."""
    claim, page = r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}; \d pairs\)", PAGE.read_text()
    said = re.findall(claim, (PAGE.parent / "objectives.md").read_text().replace("\n", " "))
    assert said and not [each for each in said if each not in page]


@pytest.mark.parametrize("task", MEASURED)
def test_what_is_kept_is_not_run_again(task, tmp_path):
    """Each of its lines is a run that the config asks for today. If a setting was changed, run them again."""
    files = [BENCHMARK["kept"](task, PAGE, name) for name in ("runs.csv", "curves.csv")]
    kept = read_kept(*files)
    variants = {line.partition(",")[0] for line in files[0].read_text().splitlines()[1:]}
    overrides = [f"sweep.only=[{', '.join(variants)}]"]
    results = Results(SweepFolder(tmp_path), Reading(10, None), kept)
    results.waiting(make_design(Sweep(BENCHMARK["config_of"](task), overrides=overrides)))
    assert results.total - results.left == len(kept) > 0


def test_new_lines_take_the_place_of_those_of_the_same_runs():
    before = "v,lr,use,x\na,1,tuning,5\na,2,result,6\n"
    fresh = "v,lr,use,x\na,2,result,7\nb,1,tuning,8\n"
    expected = "v,lr,use,x\na,1,tuning,5\na,2,result,7\nb,1,tuning,8\n"
    assert BENCHMARK["merged"](before, fresh) == expected == BENCHMARK["merged"]("", expected)


def test_runs_of_other_settings_are_kept_away_from_the_page(capsys):
    with pytest.raises(SystemExit):
        BENCHMARK["main"](["--write", "sorting", "run.steps=20"])
    assert "run.steps=20: runs of other settings would take the place" in capsys.readouterr().err


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_the_smaller_comparison_is_the_beginning_of_the_whole_one(task):
    config, few = BENCHMARK["config_of"](task), ["sweep.tune_values=[2e-4]", "sweep.tuning_seeds=1"]
    whole, _ = make_design(Sweep(config, overrides=few)).needed(lambda cell: None)
    smaller = [*few, *EXPERIMENTS[task].first]
    first, _ = make_design(Sweep(config, overrides=smaller)).needed(lambda cell: None)
    assert {cell.key for cell in first} < {cell.key for cell in whole}


def test_the_recipe_for_a_gpu_asks_for_what_it_says():
    known, later = make_design(Sweep(Path("ablation-gsm8k"))).needed(lambda cell: None)
    assert len(known) + later == 96
    assert f"# {len(known) + later} runs" in (ROOT / "configs" / "ablation-gsm8k.yaml").read_text()
    of_ppo = next(cell for cell in known if cell.name.startswith("variant=ppo max_staleness=16"))
    assert of_ppo.config.staleness.max_staleness == 16


def test_its_reward_compares_the_last_number():
    correct = runpy.run_path(str(ROOT / "configs" / "rewards" / "gsm8k.py"))["correct"]
    responses = ["so it is 1,234.", "1234.0", "12 or 34", "no idea", [{"content": "1234 apples"}]]
    assert correct(responses, ["because ...\n#### 1,234"] * 5) == [1, 1, 0, 0, 1]
