"""Which requests share keys and values in a prefix cache of vLLM."""

import numpy as np

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.vllm import salts as module
from asyncrl.rollout.engines.vllm.salts import Salts


def request(since=None):
    return GenerationRequest("r", np.ones(3, np.int32), SamplingParams(4), since)


def loaded(*versions, keeps=True):
    salts, of_loads = Salts("run-", keeps=keeps), []
    for version in versions:
        salts.load(version)
        of_loads.append(salts.of(request()))
    return salts, of_loads


def test_what_begins_has_the_live_weights_and_later_turns_those_that_their_episode_began_with():
    salts, (third, fourth, fifth) = loaded(3, 4, 5)
    assert len({third, fourth, fifth}) == 3
    assert all(salt.startswith("run-") for salt in (third, fourth, fifth))
    assert [salts.of(request(since)) for since in (None, 3, 4, 5)] == [fifth, third, fourth, fifth]
    assert salts.of(request(2)) == fifth, "not known here: of another server, or before its restart"


def test_a_version_that_comes_again_is_another_load():
    salts, (first, other, again) = loaded(3, 4, 3)
    assert first != again
    assert [salts.of(request(since)) for since in (3, 4)] == [again, other]


def test_where_contexts_are_computed_anew_all_have_the_live_weights():
    salts, (_, live) = loaded(3, 4, keeps=False)
    assert salts.of(request(3)) == live


def test_what_is_no_longer_to_be_trusted_is_never_gone_on_from():
    """Somebody else has had the server in between."""
    salts, (third, _) = loaded(3, 4)
    salts.forget()
    salts.load(5)
    assert salts.of(request(3)) == salts.of(request())
    assert salts.of(request(3)) != third


def test_it_remembers_no_more_loads_than_it_needs(monkeypatch):
    monkeypatch.setattr(module, "MOST_LOADS", 2)
    salts, (*_, second, third) = loaded(1, 2, 3)
    assert [salts.of(request(since)) for since in (1, 2, 3)] == [third, second, third]
