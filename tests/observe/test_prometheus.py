"""What Prometheus gets of a run."""

import json
import urllib.error
import urllib.request

import pytest

from asyncrl.errors import ConfigError
from asyncrl.observe.prometheus import check_port, serving_metrics

NAME = 'run "one"\\'


def test_the_newest_numbers_are_served_and_the_port_is_free_afterwards(tmp_path, make_line):
    parser = pytest.importorskip("prometheus_client.parser")
    with serving_metrics(tmp_path, NAME, 0) as url:
        assert get(url) == ""  # no step yet
        lines = [make_line(step) | {"age/3/kl": 0.25, "warnings": ["x"], "loss": None} for step in (1, 2)]
        lines[1] |= {'reward/quoted"part/mean': 0.5}
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
        families = {family.name: family for family in parser.text_string_to_metric_families(get(url))}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url.replace("metrics", "other"))
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(ConfigError, match=f"observe.metrics_port={port}: .*name another port"):
            check_port(port)
    check_port(port)
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["asyncrl_step", ("run", NAME)] == 2
    assert values["asyncrl_reward_mean", ("run", NAME)] == make_line(2)["reward/mean"]
    assert values["asyncrl_age_age_kl", ("age", "3"), ("run", NAME)] == 0.25
    assert values["asyncrl_reward_part_mean", ("part", 'quoted"part'), ("run", NAME)] == 0.5
    assert "asyncrl_loss" not in families
    assert families["asyncrl_idle_trainer"].documentation.startswith("part of the step")
    assert families["asyncrl_last_step_timestamp_seconds"].samples[0].value > 1e9


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()
