"""From the runs of a comparison to its claims."""

import csv

import numpy as np
import pytest

from asyncrl.config import SweepConfig
from asyncrl.sweep import plot
from asyncrl.sweep.record import ORIGIN
from asyncrl.sweep.report import SAME, advantages, costs, on_the_way, read_runs, report_md
from asyncrl.sweep.results import CURVE_METRICS, RunFigures
from asyncrl.sweep.statistics import holm
from asyncrl.sweep.table import FIGURES

TUNING, SEEDS = (0, 1), (2, 3, 4, 5, 6)
NOISE = np.random.default_rng(0).normal(0, 0.01, size=(3, 3, 2, 7))
LEVEL = {"good": (0.9, 0.9, 0.9), "same": (0.9, 0.9, 0.9), "bad": (0.9, 0.7, 0.2)}
LAGS = ("0", "16", "4")
"""In the order in which they were run."""


def reached(variant, lag, rate, seed):
    i, j = [*LEVEL].index(variant), ["0", "4", "16"].index(lag)
    return LEVEL[variant][j] - 0.3 * (rate == "1e-3") + NOISE[i, j, int(rate == "1e-3"), seed]


@pytest.fixture
def settings():
    return SweepConfig(
        compare={name: {} for name in LEVEL}, across_values=[0, 16, 4], tune_values=[1e-4, 1e-3], seeds=5
    )


@pytest.fixture
def runs(tmp_path):
    """A `runs.csv` in which 1e-4 is the better rate everywhere; one run is missing."""
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["variant", "staleness.fixed_lag", "trainer.lr", "seed", "use", *FIGURES, *ORIGIN, "cell"]
        )
        for variant in LEVEL:
            for lag in LAGS:
                for rate in ("1e-4", "1e-3"):
                    for seed in (*TUNING, *(SEEDS if rate == "1e-4" else ())):
                        if (variant, lag, seed) == ("bad", "4", 6):
                            continue
                        use = "tuning" if seed in TUNING else "result"
                        value = reached(variant, lag, rate, seed)
                        figures = RunFigures(*[0.5] * 7, held_out_reward=value, cpu_s=36.0, entropy=0.25)
                        numbers = [getattr(figures, name) for name in FIGURES]
                        numbers = ["" if np.isnan(n) else n for n in numbers]
                        row = [variant, lag, rate, seed, use, *numbers, "abc", "a processor", "2.13", "key"]
                        writer.writerow(row)
    return path


def test_the_claims_are_told_in_words_with_difference_interval_and_pairs(runs, settings):
    compared = read_runs(runs, settings)
    lines = [line for line in report_md(compared).splitlines() if line.startswith("- ")]
    wheres = [f"From fixed_lag 0 to {at}" for at in (4, 16)] + [
        f"Beside `good` at fixed_lag {at}" for at in (0, 4, 16)
    ]
    assert [line[2:].partition(":")[0] for line in lines[: len(wheres)]] == wheres
    found = {(claim.variant, claim.at): claim for claim in advantages(compared)}
    bad, same = (found[variant, "4"].difference for variant in ("bad", "same"))
    assert lines[3] == (
        "- Beside `good` at fixed_lag 4: "
        f"**worse**: `bad` {bad.mean:+.3f} ({bad.low:+.3f} to {bad.high:+.3f}; 4 pairs); "
        f"{SAME}: `same` {same.mean:+.3f} ({same.low:+.3f} to {same.high:+.3f}; 5 pairs)."
    )


def test_every_claim_is_a_difference_of_pairs_with_its_interval(runs, settings):
    compared = read_runs(runs, settings)
    point = compared.points["bad", "4"]
    assert (point.tuned, sorted(point.reached)) == (["1e-4"], [2, 3, 4, 5])
    claims = {(claim.variant, claim.at): claim for claim in costs(compared)}
    assert [*claims] == [(variant, lag) for variant in LEVEL for lag in ("4", "16")]
    differences = [reached("bad", "4", "1e-4", s) - reached("bad", "0", "1e-4", s) for s in SEEDS[:4]]
    claim = claims["bad", "4"]
    assert claim.difference.mean == pytest.approx(np.mean(differences))
    half = 3.182446 * np.std(differences, ddof=1) / 2
    assert claim.difference.high - claim.difference.mean == pytest.approx(half, rel=1e-6)
    assert claim.difference.n == 4
    assert claim.verdict == claims["bad", "16"].verdict == "**worse**"
    assert claims["good", "16"].verdict == claims["same", "4"].verdict == SAME
    assert [c.p for c in claims.values()] == holm([c.difference.p for c in claims.values()])
    beside = {(claim.variant, claim.at): claim.verdict for claim in advantages(compared)}
    assert {key for key, verdict in beside.items() if verdict != SAME} == {("bad", "4"), ("bad", "16")}
    assert ("good", "0") not in beside


def test_the_report_names_for_each_claim_difference_interval_and_runs(runs, settings, tmp_path):
    compared = read_runs(runs, settings)
    text = report_md(compared)
    difference = np.mean([reached("bad", "16", "1e-4", s) - reached("bad", "0", "1e-4", s) for s in SEEDS])
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `bad` | 16 | {difference:+.3f} |")][
        :1
    ]
    assert line.split("|")[5].strip() == "5"
    assert line.endswith("| **worse** |")
    assert SAME in text
    assert "36 to choose by (seeds a value: 2), 44 reported" in text
    assert "0.8 hours of processor time. Commit; machine; torch: abc; a processor; 2.13" in text
    tables = [
        [line.count("|") for line in part.splitlines()] for part in text.split("\n\n") if "|---" in part
    ]
    assert all(len({*columns}) == 1 for columns in tables)
    plot.draw_compared(tmp_path / "plot.png", compared)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_that_lacks_runs_is_named(runs, settings):
    (line,) = [line for line in report_md(read_runs(runs, settings)).splitlines() if "flatters" in line]
    assert line.endswith(": `bad` at fixed_lag 4 (4 of 5).")


def test_costs_are_from_the_first_value_of_the_settings_whatever_was_run_first(runs, settings):
    head, *lines = runs.read_text().splitlines()
    runs.write_text("\n".join([head, *reversed(lines)]) + "\n")
    assert {claim.at for claim in costs(read_runs(runs, settings))} == {"4", "16"}
    without = [line for line in lines if line.split(",")[1] != "0"]
    runs.write_text("\n".join([head, *without]) + "\n")
    assert {claim.at for claim in costs(read_runs(runs, settings))} == {"4"}, "16 comes next"


def test_the_choices_are_told_with_those_that_other_runs_might_have_made_otherwise(runs, settings):
    """Of two values one is always at the edge; one point's seeds are made to disagree."""
    rows = [*csv.reader(runs.read_text().splitlines())]
    column = rows[0].index("held_out_reward")
    for row in rows:
        if row[:4] == ["same", "4", "1e-3", "1"]:
            row[column] = "0.99"
    text = "\n".join(",".join(row) for row in rows) + "\n"
    runs.write_text(text)
    told = report_md(read_runs(runs, settings))
    torn, at_edge = [line for line in told.splitlines() if line.startswith("- The ")]
    assert torn.endswith("nothing more is known: `same` at fixed_lag 4 (1e-4 or 1e-3).")
    assert at_edge.count("(1e-4)") == len(LEVEL) * len(LAGS)
    chosen = np.mean([reached("same", "4", "1e-4", seed) for seed in TUNING])
    other = (reached("same", "4", "1e-3", 0) + 0.99) / 2
    assert f"| `same` | 4 | **{chosen:.3f}** | {other:.3f} |" in told
    assert "| variant | fixed_lag | 1e-4 | 1e-3 |" in told

    ran = [row for row in rows if row[:5] == ["same", "4", "1e-4", row[3], "result"]]
    runs.write_text(text + "".join(",".join([*row[:2], "1e-3", *row[3:]]) + "\n" for row in ran))
    told = report_md(read_runs(runs, settings)).splitlines()
    assert [line for line in told if line.startswith("- The ")] == [at_edge], "both rates are reported"


def test_the_way_is_that_of_the_reported_runs(runs, settings, tmp_path):
    compared = read_runs(runs, settings)
    curves = tmp_path / "curves.csv"
    with curves.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["variant", "staleness.fixed_lag", "trainer.lr", "seed", "use", "step", *CURVE_METRICS]
        )
        for variant in LEVEL:
            for rate in ("1e-4", "1e-3"):
                for seed in (*TUNING, *SEEDS):
                    for step in (10, 20):
                        value = seed + step if (rate, seed > 1) == ("1e-4", True) else 1e9
                        numbers = [value, *[""] * (len(CURVE_METRICS) - 1)]
                        writer.writerow([variant, "16", rate, seed, "-", step, *numbers])
    way = on_the_way(compared, curves, "16")
    assert way["bad"] == {"reward/mean": [(10, 14.0), (20, 24.0)]}  # the mean seed is 4
    plot.draw_way(tmp_path / "curves.png", compared, curves)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_before_anything_is_reported_there_is_nothing_to_claim(runs, settings, tmp_path):
    lines = runs.read_text().splitlines()
    early = tmp_path / "early.csv"
    early.write_text("\n".join([lines[0], *(line for line in lines if ",tuning," in line)]) + "\n")
    compared = read_runs(early, settings)
    assert report_md(compared) == "No variant has a reported run yet.\n"
    plot.draw_compared(tmp_path / "plot.png", compared)
