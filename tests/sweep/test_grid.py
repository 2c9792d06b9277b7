"""From grids to cells: what is run, what counts as the same run, and what is refused."""

import pytest

from asyncrl.errors import ConfigError
from asyncrl.sweep.grid import Axis, make_cells, parse_axes


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


def test_values_are_separated_by_commas_outside_of_brackets_and_quotes():
    (axis,) = parse_axes(["a.b=1e-4, null,my.losses:f,[0.9, 0.95],{c: 1, d: 2},'x,y'"])
    assert axis == Axis("a.b", ("1e-4", "null", "my.losses:f", "[0.9, 0.95]", "{c: 1, d: 2}", "'x,y'"))


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (["trainer.lr"], "cannot read `trainer.lr`: write a setting as key.sub=value"),
        (["trainer.lr="], "it has no value; write --grid trainer.lr=VALUE,VALUE"),
        (["trainer.lr=1,,2"], "`trainer.lr`: '1,,2' are not YAML values"),
        (["trainer.lr=[1"], "`trainer.lr`: '[1' are not YAML values"),
        (["trainer.lr=1", "trainer.lr=2"], "in the grid twice; give all its values in one --grid"),
        (["run.seed=1,2"], "use --seeds N"),
        (["run.dir=a,b"], "below --out DIR"),
    ],
)
def test_a_wrong_grid_is_refused(grid, words):
    assert words in refusal(parse_axes, grid)


def test_cells_are_every_combination_with_every_seed_typed_as_overrides_are(sweep_config):
    axes = parse_axes(["staleness.max_staleness=0,2", "trainer.lr_schedule=linear,constant"])
    cells = make_cells(sweep_config, axes, 2, ["run.seed=5", "trainer.lr=2e-4"])
    assert [cell.name for cell in cells[:5]] == [
        "max_staleness=0 lr_schedule=linear seed=5",
        "max_staleness=0 lr_schedule=constant seed=5",
        "max_staleness=2 lr_schedule=linear seed=5",
        "max_staleness=2 lr_schedule=constant seed=5",
        "max_staleness=0 lr_schedule=linear seed=6",
    ]
    assert len(cells) == 8
    last = cells[-1].config
    assert (last.run.seed, last.staleness.max_staleness, last.trainer.lr_schedule) == (6, 2, "constant")
    assert last.trainer.lr == 2e-4


def test_without_a_grid_there_is_one_cell_a_seed(sweep_config):
    assert [cell.name for cell in make_cells(sweep_config, [], 2)] == ["seed=0", "seed=1"]


def test_a_cell_is_known_by_its_resolved_settings_however_they_were_written(sweep_config, tmp_path):
    (as_grid,) = make_cells(sweep_config, parse_axes(["trainer.lr=1e-4"]), 1)
    (as_override,) = make_cells(sweep_config, [], 1, ["trainer.lr=0.0001", "run.name=x", "run.root=y"])
    (other_seed,) = make_cells(sweep_config, [], 1, ["trainer.lr=0.0001", "run.seed=1"])
    assert as_grid.key == as_override.key != other_seed.key
    (all_defaults,) = make_cells(sweep_config, [], 1, ["run={}"])
    (elsewhere,) = make_cells(sweep_config, [], 1, ["run={name: x, root: y}"])
    assert all_defaults.key == elsewhere.key
    placed = as_grid.placed(tmp_path / "a b")
    assert placed.run.dir == str(tmp_path / "a b")
    assert placed.trainer == as_grid.config.trainer


def test_all_that_is_wrong_with_any_cell_is_told_once(sweep_config):
    axes = parse_axes(["staleness.fixed_lag=1,3", "trainer.mini_batches=2,5,2.5"])
    message = refusal(make_cells, sweep_config, axes, 3)
    assert message.count("use staleness.max_staleness=3") == 1
    assert "at staleness.fixed_lag=3 trainer.mini_batches=2 and 1 more points" in message
    assert message.count("cannot split trainer.batch_groups=4") == 1
    assert "`trainer.mini_batches` is 2.5; it should be a valid integer" in message
    assert "at staleness.fixed_lag=1 trainer.mini_batches=2.5 and 1 more points of the grid" in message


def test_the_same_settings_twice_are_refused(sweep_config):
    axes = parse_axes(["trainer.lr=1e-4,0.0001"])
    assert "`lr=1e-4 seed=0` and `lr=0.0001 seed=0` have the same settings" in refusal(
        make_cells, sweep_config, axes, 1
    )


def test_a_directory_for_all_runs_and_no_seeds_are_refused(sweep_config):
    assert "its own directory" in refusal(make_cells, sweep_config, [], 1, ["run.dir=here"])
    assert "--seeds 0" in refusal(make_cells, sweep_config, [], 0)
