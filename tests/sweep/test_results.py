"""The tables' numbers, against numpy."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.sweep.grid import make_cells, parse_axes
from asyncrl.sweep.record import Record
from asyncrl.sweep.results import RunFigures, SeedMean, curve, figures, make_rows
from asyncrl.sweep.table import (
    Reading,
    curves_csv,
    read_kept,
    runs_csv,
    short_names,
    table_csv,
    table_md,
)

rewards_of_a_run = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


def lines(rewards):
    return [
        {
            "step": i + 1,
            "wall_s": 2.5 * (i + 1),
            "reward/mean": reward,
            "ledger/generated_tokens": 100 * (i + 1),
            "ledger/trained_tokens": 90 * (i + 1),
        }
        for i, reward in enumerate(rewards)
    ]


@given(rewards_of_a_run, st.integers(1, 30), st.floats(-10, 10))
def test_figures_of_a_run(rewards, last, target):
    found = figures(lines(rewards), last, target)
    n = min(last, len(rewards))
    means = np.convolve(rewards, np.ones(n) / n, "valid")
    assert found.final_reward == pytest.approx(np.mean(rewards[-n:]), abs=1e-12)
    assert found.best_reward == pytest.approx(means.max(), abs=1e-12)
    reached = np.flatnonzero(means >= target)
    if np.abs(means - target).min() > 1e-9:  # not a matter of rounding
        step = reached[0] + n if len(reached) else math.nan
        assert found.steps_to_target == pytest.approx(step, nan_ok=True)
        assert found.time_to_target_s == pytest.approx(2.5 * step, nan_ok=True)
    assert (found.generated_tokens, found.trained_tokens) == (100 * len(rewards), 90 * len(rewards))


def test_without_a_target_none_is_reached():
    assert math.isnan(figures(lines([1.0, 1.0]), 2, None).steps_to_target)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=8))
def test_estimates_are_means_and_standard_errors(values):
    known = np.array([value for value in values if not math.isnan(value)])
    estimate = SeedMean.of(values)
    assert estimate.n == len(known)
    assert estimate.mean == (
        pytest.approx(known.mean(), abs=1e-9) if len(known) else pytest.approx(math.nan, nan_ok=True)
    )
    if len(known) > 1:
        assert estimate.error == pytest.approx(known.std(ddof=1) / np.sqrt(len(known)), rel=1e-6, abs=1e-9)
    else:
        assert math.isnan(estimate.error)


@pytest.fixture
def small_sweep(sweep_config):
    """Axes, cells, and figures of all runs but those of one point and one other."""
    axes = parse_axes(["trainer.lr=1e-3,2e-3,3e-3", "staleness.on_stale=wait,drop"])
    cells = make_cells(sweep_config, axes, 3)
    runs = {}
    for i, cell in enumerate(cells):
        if cell.point[0][1] != "3e-3" and i != 0:
            reached = math.nan if i % 2 else 10.0 * i
            runs[cell] = RunFigures(0.1 * i, 0.2 * i, 4.0 * i, reached, 1000.0 * i, 900.0 * i, 5.0)
    return axes, cells, runs


def test_rows_are_points_in_grid_order_over_the_seeds_that_finished(small_sweep):
    axes, cells, runs = small_sweep
    rows = make_rows(cells, runs)
    assert [tuple(value for _, value in row.point) for row in rows] == [
        (lr, stale) for lr in axes[0].values for stale in axes[1].values
    ]
    assert [(row.seeds, row.missing) for row in rows] == [(2, 1), (3, 0), (3, 0), (3, 0), (0, 3), (0, 3)]
    finals = np.array([0.1, 0.7, 1.3])  # cells 1, 7 and 13 are the second point's
    assert rows[1].estimates["final_reward"].mean == pytest.approx(finals.mean())
    assert rows[1].estimates["final_reward"].error == pytest.approx(finals.std(ddof=1) / math.sqrt(3))


def test_the_csv_tables_hold_every_number_under_its_name(small_sweep):
    axes, cells, runs = small_sweep
    rows = make_rows(cells, runs)
    read = list(csv.DictReader(io.StringIO(table_csv(axes, rows, Reading(10, 0.9)))))
    assert [(line["trainer.lr"], line["staleness.on_stale"]) for line in read][:2] == [
        ("1e-3", "wait"),
        ("1e-3", "drop"),
    ]
    assert (read[0]["last_steps"], read[0]["target"], read[0]["missing"]) == ("10", "0.9", "1")
    assert float(read[1]["final_reward_mean"]) == pytest.approx(0.7)
    assert read[5]["final_reward_mean"] == read[5]["final_reward_se"] == ""
    records = dict.fromkeys(runs, Record("abc", "a processor", "2.13"))
    of_runs = list(csv.DictReader(io.StringIO(runs_csv(axes, cells, runs, records))))
    assert len(of_runs) == len(runs) == 11
    assert (of_runs[0]["seed"], of_runs[0]["final_reward"]) == ("0", "0.1")
    assert (of_runs[0]["commit"], of_runs[0]["machine"], of_runs[0]["use"]) == (
        "abc",
        "a processor",
        "result",
    )


def test_what_the_csv_tables_hold_is_read_back(small_sweep, tmp_path):
    axes, cells, runs = small_sweep
    records = {
        cell: Record("abc", "a processor, 2 cores", "2.13", 0.1 + seed, 2.5) for seed, cell in enumerate(runs)
    }
    scored = {
        cell: replace(run, held_out_reward=records[cell].held_out_reward, cpu_s=2.5)
        for cell, run in runs.items()
    }
    curves = {cell: curve(lines([0.25 * seed, 0.5])) for seed, cell in enumerate(runs)}
    files = tmp_path / "runs.csv", tmp_path / "curves.csv"
    with pytest.raises(ConfigError, match=r"runs.csv: No such file or directory; name `runs.csv` and"):
        read_kept(*files)
    texts = runs_csv(axes, cells, scored, records), curves_csv(axes, curves)
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    for wrong in (files[::-1], (files[0], files[0])):
        with pytest.raises(ConfigError, match="are not what one sweep of this version has written"):
            read_kept(*wrong)
    known = read_kept(*files)
    assert {cell.key for cell in runs} == known.keys()
    found = {cell: known[cell.key] for cell in runs}
    of_known = (
        {cell: getattr(k, part) for cell, k in found.items()} for part in ("figures", "record", "curve")
    )
    figures_of, record_of, curve_of = of_known
    assert record_of == records
    assert (runs_csv(axes, cells, figures_of, record_of), curves_csv(axes, curve_of)) == texts


def test_the_markdown_table_says_how_to_read_it_and_what_is_missing(small_sweep):
    axes, cells, runs = small_sweep
    text = table_md(axes, make_rows(cells, runs), Reading(10, 0.9))
    assert "mean of the last 10 steps" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0].startswith("| lr | on_stale | seeds | final reward | best reward | s to 0.9 |")
    assert len({line.count("|") for line in table}) == 1
    assert "| 1e-3 | wait | 2 (1 missing) | 0.900 ± 0.300 |" in table[2]
    assert "| 3e-3 | drop | 0 (3 missing) | - | - |" in table[-1]
    assert "- (0 of 3)" in table[3], "no odd cell reached the target"
    assert "s to" not in table_md(axes, make_rows(cells, runs), Reading(10, None))


def test_keys_that_end_alike_are_written_out():
    axes = parse_axes(["rollout.threads=1", "trainer.threads=1", "run.steps=2"])
    assert short_names(axes) == ["rollout.threads", "trainer.threads", "steps"]
