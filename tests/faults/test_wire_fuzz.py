"""A live coordinator refuses, counts and survives whatever is no honest message. For longer:
`test_wire_soak.py`."""

import asyncio
import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_coordinator import live_coordinator
from wire_attack import Attack


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    """`attack(lambda a: a.round(...))`: on one coordinator, which outlives all of it."""
    with asyncio.Runner() as runner:
        context = live_coordinator(tmp_path_factory.mktemp("coordinator"))
        on = Attack(runner.run(context.__aenter__()))
        yield lambda act: runner.run(act(on))
        runner.run(context.__aexit__(None, None, None))


@settings(
    max_examples=30,
    phases=[Phase.generate],  # a coordinator that is dead by then cannot tell which message it was
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False))
def test_what_is_malformed_or_not_the_peers_to_say_is_refused_and_changes_nothing(attack, rng):
    attack(lambda a: a.round(rng, 8))


def test_whoever_has_not_the_keys_is_not_heard(attack):
    attack(lambda a: a.without_the_keys())


def test_a_recorded_connection_cannot_be_replayed(attack):
    attack(lambda a: a.replay_a_connection())


def test_another_protocol_does_no_harm(attack):
    attack(lambda a: a.in_another_protocol(random.Random(0)))
    attack(lambda a: a.round(random.Random(1), 1))
