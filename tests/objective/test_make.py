"""The catalogue agrees with the functions, and names become functions."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from asyncrl.errors import ConfigError
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.catalogue import (
    ADVANTAGES,
    AGGREGATIONS,
    COMPARE_WITHIN_GROUPS,
    GROUP_ADVANTAGES,
    POLICY_LOSSES,
)
from asyncrl.objective.make import declared_settings, make_advantage, make_policy_objective
from asyncrl.objective.ppo import decoupled_ppo
from asyncrl.objective.trust_region import m2po_mask
from asyncrl.resolve import resolve

ENTRIES = {**POLICY_LOSSES, **ADVANTAGES}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_catalogue_knows_which_losses_have_a_proximal_policy(name, random_tokens):
    tokens = random_tokens(0)
    moved = dataclasses.replace(tokens, prox_logprobs=tokens.prox_logprobs - 0.3)
    loss = make_policy_objective(name, {}).loss
    assert torch.equal(loss(tokens).loss, loss(moved).loss) == (not POLICY_LOSSES[name].has_proximal)
    assert make_policy_objective(name, {}).has_proximal == POLICY_LOSSES[name].has_proximal


@pytest.mark.parametrize("name", ENTRIES)
def test_the_catalogue_agrees_with_the_signature_and_every_setting_has_a_default(name):
    entry = ENTRIES[name]
    function = resolve(entry.function)
    declared = declared_settings(function)
    if entry.batch_mask:
        declared |= declared_settings(resolve(entry.batch_mask))
    assert sorted(declared) == sorted(entry.settings)
    assert all(declared.values())
    assert function.__name__ == {"tis": "decoupled_ppo"}.get(name, name)
    assert "Source: " in inspect.getdoc(function)
    assert entry.aggregation in AGGREGATIONS


def test_what_compares_within_groups_is_in_the_catalogue():
    assert GROUP_ADVANTAGES.keys() >= COMPARE_WITHIN_GROUPS


def test_the_catalogue_imports_no_torch():
    code = "import sys, asyncrl.objective.catalogue; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_objective_is_made_with_its_own_settings_only(random_tokens):
    tokens = random_tokens(2)
    made = make_policy_objective("decoupled_ppo", {"behavior_cap": 0.5, "tau_pos": 2.0})
    assert torch.equal(made.loss(tokens).loss, decoupled_ppo(tokens, behavior_cap=0.5).loss)
    assert (made.aggregation, made.batch_mask) == ("token_mean", None)
    assert make_policy_objective("gspo", {}).aggregation == "sequence_mean"


def test_the_settings_of_a_batch_mask_reach_it(random_tokens):
    tokens = random_tokens(3)
    kept = {}
    for limit in (0.0, 0.04, 5.0):
        made = make_policy_objective("m2po", {"max_second_moment": limit})
        kept[limit] = made.batch_mask(tokens)
        assert torch.equal(kept[limit], m2po_mask(tokens, max_second_moment=limit))
    assert kept[0.0].sum() < kept[0.04].sum() < kept[5.0].sum()


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"decoupled_ppq: unknown; choose one of a_lol, cispo, clip_cov, decoupled_ppo"
    ):
        make_policy_objective("decoupled_ppq", {})
    with pytest.raises(ConfigError, match=r"objective.advantage=gap.*dr_grpo, gae, grpo"):
        make_advantage("gap", {})


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "own.py").write_text(
        "from asyncrl.objective.policy import PolicyTerms, score\n"
        "def loss(tokens, *, strength, offset=0.0):\n"
        "    return PolicyTerms(-strength * tokens.known_advantages * score(tokens) + offset, ~tokens.mask)\n"
        "def advantage(outcomes, *, weight=1.0):\n"
        "    return weight * outcomes.rewards\n"
    )
    return "own.py"


def test_a_users_own_functions_take_what_they_declare(own, random_tokens):
    settings = {"strength": 3.0, "weight": 2.0}
    tokens = random_tokens(0)
    made = make_policy_objective(f"{own}:loss", settings)
    torch.testing.assert_close(made.loss(tokens).loss, -3 * tokens.known_advantages)
    assert made.aggregation == "token_mean"
    outcomes = Outcomes(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.tensor([5, 5]))
    assert make_advantage(f"{own}:advantage", settings)(outcomes).tolist() == [2.0, 4.0]


def test_what_is_wrong_with_a_users_own_function_is_said(own):
    with pytest.raises(
        ConfigError, match=r"own.py:loss`: its setting `strength` .* objective.settings.strength"
    ):
        make_policy_objective(f"{own}:loss", {})
    with pytest.raises(ConfigError, match=r"objective.policy_loss `own.py:lost`: .* did you mean `loss`"):
        make_policy_objective(f"{own}:lost", {})
