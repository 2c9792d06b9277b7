"""The page of a report, from run directories of all kinds."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from pages import Page, check_numbers, needs_chromium, opened

import asyncrl
from asyncrl.cli.main import main
from asyncrl.core.coordinator import LoopSettings
from asyncrl.core.records import GroupSummary, LeftOut
from asyncrl.observe.samples import FILE_NAME as SAMPLES
from asyncrl.report.page import MOST_CHARACTERS, names, report_or_why_not
from asyncrl.report.run import find_run, read_run, state_of
from asyncrl.runfiles.budget import Usage
from asyncrl.runfiles.store import LedgerStore

STEPS = range(1, 41)


def page_of(*folders):
    html = asyncrl.write_report(folders).read_text("utf-8")
    return Page(html), html


def write_samples(folder, response, prompt="p", steps=(1,)):
    sample = {"step": 1, "chosen": ["best"], "group": 1, "row": 2, "reward": 0.125, "parts": {"right": 0.25}}
    sample |= {"tokens": 3, "finish": "stop", "versions": [0, 1], "prompt": prompt, "response": response}
    lines = [json.dumps(sample | {"step": step}) + "\n" for step in steps]
    (folder / SAMPLES).write_text("".join(lines))


def test_its_numbers_are_those_of_the_metrics(make_run, make_line):
    lines = [make_line(step) for step in STEPS]
    page, _ = page_of(make_run(lines=lines))
    rewards = [line["reward/mean"] for line in lines]
    by_step, over_time = page.numbers["reward/mean"][:4], page.numbers["reward/mean"][4:]
    assert by_step == over_time == [rewards[0], rewards[-1], min(rewards), max(rewards)]
    check_numbers(page, lines)
    assert {
        fate: numbers[0] for fate, numbers in page.numbers.items() if fate in ("trained", "in flight")
    } == {
        "trained": 3600,
        "in flight": 30,
    }
    assert page.numbers["train"] == [80.0]
    ages = page.numbers["age/{age}/kl"]
    assert ages[:2] == [0.0, pytest.approx(0.01 * 20.5)]


def test_every_chart_has_a_title_axes_and_valid_svg(make_run, make_line):
    one, two = (
        make_run(name, [make_line(step, reward__mean=v, reward__exact_match__mean=v) for step in STEPS])
        for name, v in [("a", 1.0), ("b", 2.0)]
    )
    path = asyncrl.write_report([one, two], one / "r.html")
    html = path.read_text("utf-8")
    figures = html.split("<figure")[1:]
    assert len(figures) > 20
    for figure in figures:
        svg = ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
        space = {"s": "http://www.w3.org/2000/svg"}
        title, label = (svg.find(f"s:{kind}", space).text for kind in ("title", "text[@class='name']"))
        assert title
        assert re.fullmatch("[^{}]+, [^{}]+|share of the tokens", label), "a name and a unit"
        assert len(svg.findall("s:text[@class='x']", space)) >= 2
        assert svg.findall("s:text[@class='y']", space)
        assert [name.text for name in svg.findall("s:text[@class='x name']", space)] in (
            ["training step"],
            ["minutes since the start of the run"],
            ["age of the tokens, versions"],
        )
        legend = figure[figure.index("<ul") :]
        assert "<b>a</b>" in legend
        assert "<b>b</b>" in legend
    assert "kl/behavior, nats" in html
    assert "Mean of one part, as its function, model or episode gave it: exact_match" in html


EVIL = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>&lt;\x1b[31m\x00\u202e'


def test_texts_of_a_run_cannot_become_part_of_the_page(make_run, make_line):
    folder = make_run(
        "<script>run", [make_line(1, warnings=[EVIL]), make_line(2, **{f"reward/{EVIL}/mean": 1.0})]
    )
    write_samples(folder, EVIL, EVIL)
    with (folder / "config.yaml").open("a") as file:
        file.write("# </pre><script>\n")
    page, html = page_of(folder)
    assert page.count("script") == page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert '<script>alert("x")' in page.text
    assert not {"\x1b", "\x00", "\u202e"} & {*html}
    assert "default-src 'none'" in html


def test_it_needs_nothing_beside_it(make_run, make_line):
    page, html = page_of(make_run(lines=[make_line(1)]))
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "action", "data")]
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    assert {link[1:] for link in links[1:]} <= {a.get("id") for _, a in page.tags}
    assert "url(" not in html
    assert "@import" not in html


def test_ten_thousand_steps_are_a_small_file(make_run, make_line):
    lines = (make_line(step, entropy=99.0 if step == 7777 else math.sin(step)) for step in range(1, 10_001))
    page, html = page_of(make_run(lines=lines))
    assert len(html) < 5e6 / 10
    assert page.numbers["entropy"][3] == 99.0


def test_a_half_written_line_is_left_out(make_run, make_line):
    folder = make_run(lines=[make_line(1), make_line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_line(3))[:200])
    write_samples(folder, "whole")
    with (folder / SAMPLES).open("a") as file:
        file.write('{"step": 2, "cho')
    page, _ = page_of(folder)
    assert page.numbers["reward/mean"][1] == make_line(2)["reward/mean"]
    assert "whole" in page.text
    assert "not finished: 2 of 40 steps are done" in page.text


def test_a_run_without_metrics_samples_or_ledger_yet(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    page, _ = page_of(folder)
    assert "No step is finished yet." in page.text
    assert "No responses were kept." in page.text
    assert f"asyncrl-launch --resume {folder}" in page.text
    assert page.count("figure") == 0


def test_old_metrics_that_lack_much(make_run):
    page, _ = page_of(
        make_run(lines=[{"step": 1, "loss": 0.5, "of_another_version": 3}], config="what: ever\n")
    )
    assert page.numbers["loss"] == [0.5] * 4
    assert page.numbers["of_another_version"] == [3.0] * 4
    assert "what" in page.text


def test_a_run_goes_on_as_long_as_it_is_seen(make_run, make_line):
    folder = make_run(lines=[make_line(1)])
    Usage(0, 0.0, seen_at=1000.0).save(folder / "usage.json")
    run = read_run(folder, "run")
    assert run.state(1005.0) == state_of(find_run(folder), 1005.0) == "going on: 1 of 40 steps are done"
    assert run.state(2000.0) == state_of(find_run(folder), 2000.0) == "not finished: 1 of 40 steps are done"


@pytest.mark.parametrize("is_in_use", [True, False])
def test_the_ledger_is_read_and_left_as_it_is(make_run, make_line, is_in_use):
    folder = make_run(lines=[make_line(1)])
    store = LedgerStore(folder / "ledger.db", encode=str.encode, decode=bytes.decode)
    coordinator = store.load(LoopSettings(1, 0, "wait", 10, max_attempts=1), 5, 0, shuffle=True)
    (lease,) = coordinator.lease("w", 0, 1)
    summary = GroupSummary({0: 100}, (1.0, 0.0), left_out=LeftOut(7, (0.5,)))
    coordinator.submit(lease.group_id, lease.lease_id, summary, "group")
    coordinator.take(0)
    coordinator.published(1)
    (lease,) = coordinator.lease("w", 1, 1)
    coordinator.fail(lease.group_id, lease.lease_id, "the reward raised", sampled_tokens=30)
    store.save(coordinator)
    if not is_in_use:
        store.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = read_run(folder, "run")
    assert {path.name for path in folder.iterdir()} == {*before}
    assert (folder / "ledger.db").read_bytes() == before["ledger.db"]
    assert run.books == coordinator.ledger.metrics() | {"ledger/left_out_tokens": 7}
    page, _ = page_of(folder)
    assert {fate: page.numbers[fate][0] for fate in ("trained", "dropped", "left out", "failed")} == {
        "trained": 100,
        "dropped": 0,
        "left out": 7,
        "failed": 30,
    }
    assert "the reward raised" in page.text
    store.close()


def test_a_broken_ledger_leaves_the_metrics(make_run, make_line):
    folder = make_run(lines=[make_line(2)])
    (folder / "ledger.db").write_bytes(b"noise" * 1000)
    page, _ = page_of(folder)
    assert page.numbers["trained"] == [180, 6]


def test_long_texts_lose_their_middle(make_run, make_line):
    folder = make_run(lines=[make_line(1)])
    write_samples(folder, "a" * 10 + "b" * 10**5 + "c" * 10, steps=range(1, 20))
    page, html = page_of(folder)
    assert "aaab" in page.text
    assert "bccc" in page.text
    assert len(html) < 10 * MOST_CHARACTERS + 300_000


def test_what_is_no_run_is_refused(tmp_path, capsys, make_run):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "neither config.yaml nor metrics.jsonl" in capsys.readouterr().err
    assert main(["report", str(make_run()), "--out", str(tmp_path / "no" / "folder.html")]) == 2
    assert "name another file" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_leaves_a_run_in_peace(make_run, make_line):
    folder = make_run(lines=[make_line(1)])
    (folder / "report.html").mkdir()
    assert report_or_why_not(folder).startswith("none was written")


@pytest.mark.slow
@needs_chromium
def test_a_browser_has_nothing_to_complain_of(make_run, make_line, tmp_path):
    folder = make_run(lines=[make_line(step, warnings=[EVIL]) for step in STEPS])
    write_samples(folder, EVIL + "<script>document.title = 'run by a response'</script>")
    path = asyncrl.write_report(folder)
    seen = opened(path, tmp_path)
    assert seen.console == []
    assert seen.dom.count("<figure") == path.read_text("utf-8").count("<figure") > 20
    assert "<title>run: AsyncRL</title>" in seen.dom
    broken = tmp_path / "broken.html"  # what it does complain of is heard
    broken.write_text(path.read_text("utf-8").replace("</body>", "<script>undefined.x</script></body>"))
    assert len(opened(broken, tmp_path).console) == 1


def test_several_runs_have_names_that_tell_them_apart(tmp_path):
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert len({*names([tmp_path, tmp_path])}) == 2
