"""Which servers `rollout.http` may name."""

import pytest

from asyncrl.config import from_tree
from asyncrl.errors import ConfigError

TREE = {
    "model": {"path": "m"},
    "data": {"path": "rows.jsonl"},
    "reward": {"functions": [{"function": "my.rewards:right"}]},
}
RIGHT = ["rollout.engine=http", "rollout.http.urls=[http://a:8000]", "rollout.http.weights_dir=/dev/shm/w"]


def test_servers_that_can_be():
    urls = "[http://a:8000, https://b.example/proxied, 'http://[::1]:80', http://10.0.0.1:8000]"
    config = from_tree(
        TREE, overrides=[*RIGHT, f"rollout.http.urls={urls}", "rollout.http.api_key_env=MY_KEY"]
    )
    assert len(config.rollout.http.urls) == 4


def test_other_engines_need_no_servers():
    assert from_tree(TREE).rollout.http.urls == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.http.urls=[]", "no servers; name them in rollout.http.urls=[http://HOST:PORT, ...]"),
        (
            "rollout.http.urls=[a:8000]",
            "'a:8000' is no http or https URL; each should be like http://HOST:PORT",
        ),
        ("rollout.http.urls=[ftp://a]", "'ftp://a' is no http or https URL"),
        ("rollout.http.urls=['http://']", "'http://' is no http or https URL"),
        ("rollout.http.urls=[http://a:x]", "'http://a:x' is no URL"),
        ("rollout.http.urls=[http://a:99999]", "'http://a:99999' is no URL"),
        ("rollout.http.urls=['http://a/?x=1']", "has a query or fragment"),
        ("rollout.http.urls=[http://a:1, HTTP://A:1/]", "names http://a:1 2 times; name each server once"),
        ("rollout.http.weights_dir=null", "weights_dir=null: name a folder, by its absolute path"),
        ("rollout.http.weights_dir=weights", "weights_dir=weights: name a folder, by its absolute path"),
        ("rollout.http.load_timeout_s=120", "raise weights.ack_timeout_s"),
        ("rollout.workers=2", "one worker drives all servers; use rollout.workers=1"),
        ("rollout.guests=2", "one worker drives all servers; use rollout.guests=0"),
        ("rollout.kept_contexts=8", "the servers keep what they have room for"),
        ("run.mode=inline", "use rollout.engine=torch, or run.mode=async"),
        ("rollout.tensor_parallel_size=2", "only rollout.engine=vllm splits a model"),
    ],
)
def test_servers_that_cannot_be_are_refused_with_a_remedy(override, says):
    with pytest.raises(ConfigError) as refusal:
        from_tree(TREE, overrides=[*RIGHT, override])
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    "override", ["rollout.http.api_key_env=sk-s3cret", "rollout.http.urls=['http://me:sk-s3cret@a:1']"]
)
def test_a_key_in_the_config_is_refused_and_not_repeated(override):
    with pytest.raises(ConfigError) as refusal:
        from_tree(TREE, overrides=[*RIGHT, override])
    assert "s3cret" not in str(refusal.value)
