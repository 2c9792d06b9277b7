"""Rows by their pass rates: how often each comes, and that this is the same after a restart."""

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncrl
from asyncrl.config.data import SAMPLERS, CurriculumConfig, DataConfig, DatasetConfig
from asyncrl.config.load import from_tree
from asyncrl.core.coordinator import LoopSettings
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.records import GroupSummary, LeftOut
from asyncrl.curriculum.mix import make_mix
from asyncrl.curriculum.samplers import SHARES, PassRates, make_sampler
from asyncrl.data.prompts import Prompt
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.runfiles.store import LedgerStore

ROWS = 12


def sampler(rows=ROWS, columns=None, **chosen):
    prompts = [Prompt(i, "say", None, {} if columns is None else columns[i]) for i in range(rows)]
    return make_sampler(DataConfig(curriculum=CurriculumConfig(**chosen)), prompts)


def measure(sampler, rates, start=0):
    """Every row gets a group of ten with this pass rate."""
    for row, rate in enumerate(rates):
        passed = round(10 * rate)
        sampler.finished(start + row, row, [1.0] * passed + [0.0] * (10 - passed))


def test_the_samplers_are_those_that_the_config_names():
    assert set(SHARES) == set(SAMPLERS)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        # Of 12 epochs, with pass rates 0, 0.1, 0.5, 0.8, 1 and one that was not measured; at least every 4th.
        ("band", [3, 3, 12, 12, 3, 12]),
        ("failures", [12, 11, 6, 3, 3, 12]),
        ("learnability", [3, 4, 12, 8, 3, 12]),
    ],
)
def test_each_row_comes_in_its_share_of_the_epochs_evenly(name, turns):
    one = sampler(sampler=name)
    measure(one, [0, 0.1, 0.5, 0.8, 1])
    for row, expected in enumerate(turns):
        came = [epoch for epoch in range(12) if one.comes(row, epoch)]
        assert abs(len(came) - expected) <= 1
        gaps = {b - a for a, b in pairwise(came)}
        assert max(gaps) - min(gaps) <= 1, "its turns are not spread evenly"


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=5), st.integers(1, 3))
def test_what_is_known_of_a_row_does_not_hang_on_the_order_in_which_groups_end(order, again, over):
    def known(group_ids):
        rates = PassRates(0.5, over)
        for i in group_ids:
            rates.finished(i, i % 2, [float(i > k) for k in range(8)])
        return [rates.of(row) for row in range(3)], rates.metrics(3)

    assert known([*order, *again]) == known(range(8))


def test_the_newest_groups_count_and_what_was_left_out_too():
    rates = PassRates(0.5, over_groups=2)
    for group_id, rewards in enumerate(([0, 0], [1, 0], [1, 1, 1, 0])):
        rates.finished(group_id, 0, rewards)
    assert rates.of(0) == 4 / 6
    assert rates.of(1) is None


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_that_all_rest_hold_nothing_up_and_have_their_turns(shuffle):
    one = sampler(rest_epochs=5)
    measure(one, [1.0] * ROWS)
    cursor = PromptCursor(ROWS, 3, sampler=one, shuffle=shuffle)
    came = Counter(cursor.next() for _ in range(4 * ROWS))
    assert all(3 <= came[row] <= 5 for row in range(ROWS))
    assert cursor.epochs == [pytest.approx(4 * 5, abs=1)]


def test_a_sampler_that_lets_nothing_come_holds_nothing_up():
    class Nothing:
        def comes(self, row, epoch):
            return False

        def instead(self, row):
            return row

    cursor = PromptCursor(ROWS, 3, sampler=Nothing())
    assert len([cursor.next() for _ in range(5)]) == 5


def test_datasets_keep_their_shares_whatever_rests_in_them():
    one = sampler(rest_epochs=4)
    measure(one, [1.0] * 8 + [0.5] * 4)
    mix = make_mix([DatasetConfig(path="a", weight=3.0), DatasetConfig(path="b")])
    cursor = PromptCursor([8, 4], 3, sampler=one, mix=mix)
    for number in range(1, 200):
        cursor.next()
        handed_out = sum(cursor.positions) - cursor.passed_over
        assert handed_out == number
    assert cursor.positions[1] == pytest.approx(200 / 4, abs=3)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["lease", "submit", "lose", "crash"]), max_size=40), st.data())
def test_after_a_crash_at_any_moment_the_same_rows_come(events, data):
    """Beside a coordinator that never crashes."""
    with tempfile.TemporaryDirectory() as folder:
        crashing, steady = Path(folder) / "a.db", Path(folder) / "b.db"
        loop, args = LoopSettings(2, 8, "wait", 1000), {"rows": ROWS, "seed": 3, "shuffle": True}

        def load(path):
            store = LedgerStore(path, str.encode, bytes.decode)
            return store, store.load(loop, **args, sampler=sampler(rest_epochs=3, over_groups=2))

        sides, leases = [load(crashing), load(steady)], []
        for event in events:
            rewards = data.draw(st.tuples(*[st.sampled_from([0.0, 1.0])] * 2), label="rewards")
            left = LeftOut(3, data.draw(st.sampled_from([(), (1.0,), (0.0, 1.0)]), label="left out"))
            got = []
            for store, coordinator in sides:
                if event == "lease":
                    got.append(coordinator.lease("w", 0, 3))
                elif event == "submit" and leases:
                    summary = GroupSummary({0: 2}, rewards, left)
                    coordinator.submit(leases[0].group_id, leases[0].lease_id, summary, "group")
                elif event == "lose":
                    coordinator.worker_lost("w")
                store.save(coordinator)
                coordinator.ledger.check()
            if event == "lease":
                assert got[0] == got[1]
                leases += got[0]
            elif event == "submit":
                leases = leases[1:]
            elif event == "crash":
                sides[0][0].close()
                sides[0] = load(crashing)
                crashed, whole = (coordinator for _, coordinator in sides)
                assert crashed.ledger.metrics() == whole.ledger.metrics()
                assert crashed.cursor.sampler.metrics() == whole.cursor.sampler.metrics()
        for store, _ in sides:
            store.close()


OWN = """
def by_level(pass_rate, level, **_):
    return 1.0 if level == "hard" else 0.0


def nothing(pass_rate, **_):
    return None


def broken(pass_rate, **_):
    raise KeyError("oh")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


def test_a_sampler_of_the_users_own_reads_columns_of_the_row(own):
    columns = [{"level": "hard" if row % 2 else "easy"} for row in range(ROWS)]
    one = sampler(sampler=own("by_level"), columns=columns, rest_epochs=3)
    measure(one, [0.5] * ROWS)
    came = Counter(row for row in range(ROWS) for epoch in range(6) if one.comes(row, epoch))
    assert came == {row: 6 if row % 2 else 2 for row in range(ROWS)}


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", r"own\.py:nothing` returned None; it should return a float"), ("broken", "KeyError: 'oh'")],
)
def test_a_sampler_of_the_users_own_that_says_nothing_ends_the_run(own, name, message):
    one = sampler(sampler=own(name))
    measure(one, [0.5])
    with pytest.raises(RunFailed, match=message):
        one.comes(0, 0)


REWARDS = """
def by_column(completions, success, **_):
    return [{"always": 1.0, "never": 0.0}.get(success[0], float(i % 2)) for i in range(len(completions))]
"""


@pytest.fixture
def config_of(make_config, tmp_path):
    """A run on four rows each that are always solved, never, and sometimes."""
    (tmp_path / "by_column.py").write_text(REWARDS)
    kinds = ["always", "never", "sometimes"] * 4
    rows = "".join(f'{{"prompt": "say {i}", "success": "{kind}"}}\n' for i, kind in enumerate(kinds))
    (tmp_path / "rows.jsonl").write_text(rows)

    def config_of(*overrides):
        tree = make_config(
            *("run.mode=inline", "run.steps=12", "rollout.max_new_tokens=4", "trainer.lr=1e-6", *overrides)
        ).model_dump(mode="python")
        tree["data"]["path"] = str(tmp_path / "rows.jsonl")
        tree["reward"] = {"functions": [{"function": f"{tmp_path / 'by_column.py'}:by_column"}]}
        return from_tree(tree)

    return config_of


def trained_rows(run_dir, config):
    with open_state(config, RunDir(run_dir)) as (prompts, store, coordinator):
        rows = [entry.row for entry, _ in store.trained_since(0).values()]
    return Counter(prompts[row].columns["success"] for row in rows), coordinator


def test_a_run_samples_what_it_can_learn_from_more_often(config_of, one_thread, tmp_path):
    config = config_of("data.curriculum={rest_epochs: 4}", "staleness.max_staleness=1")
    run = asyncrl.run(config, progress=False)
    came, coordinator = trained_rows(run.run_dir, config)
    assert came["sometimes"] > 2 * max(came["always"], came["never"])
    assert min(came.values()) >= 4, "a row was never measured"
    line = read_metrics(run.run_dir / "metrics.jsonl")[-1]
    assert line["curriculum/measured_frac"] == 1
    assert line["curriculum/solved_frac"] == line["curriculum/failed_frac"] == pytest.approx(1 / 3)
    assert coordinator.cursor.passed_over > 0


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ("{band: [0.8, 0.2]}", r"band=\[0\.8, 0\.2\]: write two pass rates from 0 to 1, the lower one first"),
        ("{sampler: failures, band: [0.1, 0.2]}", "is for data.curriculum.sampler=band, and it is failures"),
        ("{sampler: hardest}", "there are band, failures, learnability, and your own"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(make_config, curriculum, message):
    with pytest.raises(ConfigError, match=message):
        make_config(f"data.curriculum={curriculum}")
