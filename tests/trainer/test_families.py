"""Every family of decoders is trained as transformers computes it, packed or a sequence a row."""

import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, WINDOW, tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.decoders.facts import TrainingForm
from asyncrl.errors import ConfigError
from asyncrl.plan.facts.model import (
    FoundModel,
    ModelSource,
    model_facts,
)
from asyncrl.plan.facts.training_form import training_form
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.critic.model import make_critic
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import make_policy
from asyncrl.trainer.packing.batch import flatten
from asyncrl.trainer.packing.mini_batch import mini_batch
from asyncrl.trainer.ranks import OneRank

TEMPERATURE = 0.8
PAGE = Path(__file__).parents[2] / "docs/models.md"
ROWS = {
    family: (trainer, logits)
    for family, trainer, logits in re.findall(
        r"^\|[^|]*\| `(\w+)` \| (.*?) \| (\w*) ?\|", PAGE.read_text(), re.M
    )
}
"""The table of the documentation: how each family is trained, and what becomes of its logits."""
BARE = {"lfm2", "lfm2_moe", "ministral"}
"""Families whose configuration by default is of no model that there is."""


@pytest.fixture
def batch(random_batch):
    """Three groups of four, of which most sequences are longer than a window."""
    flat = flatten(random_batch(5, groups=3, group_size=4, max_response=3 * WINDOW))
    assert np.median(np.diff(flat.offsets)) > WINDOW
    return flat


def micro_batches(models, flat, max_tokens=100):
    packing = common_packing(models, max_tokens)
    mini = mini_batch(flat, np.arange(flat.sequences), packing, OneRank(torch.device("cpu")), 1)
    assert len(mini.on_host) > 1
    return list(mini.micros())


def plain_logprobs(model, flat, temperature=TEMPERATURE):
    """float[T] of a forward pass for each sequence alone, 0 where nothing is trained."""
    logprobs = []
    for start, end in zip(flat.offsets[:-1], flat.offsets[1:], strict=True):
        ids = torch.from_numpy(flat.token_ids[start:end])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
        chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        logprobs += [torch.zeros(1), chosen]
    return torch.cat(logprobs) * torch.from_numpy(flat.loss_mask)


def as_documented(policy):
    packed = "packed, prompts shared" if policy.shares_prefixes else "packed"
    shape = policy.fused_head.shape
    bent = "capped" if shape.cap is not None else "scaled" if shape.scale != 1 else ""
    return packed if policy.unpacked is None else "unpacked", bent


def gradients(model):
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in FAMILIES), *((f, True) for f in ("opt", "qwen3", "llama4_text"))],
)
def test_log_probabilities_and_gradients_are_those_of_a_plain_forward_pass(
    family, checkpointing, batch, make_config
):
    """Checkpointing included: layers that drop out by themselves while they are trained must not."""
    model = tiny(family)
    weights = torch.linspace(-1, 2, len(batch.token_ids))
    expected = plain_logprobs(model, batch)
    (expected * weights).sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    trainer = {"gradient_checkpointing": checkpointing}
    policy = make_policy(model, make_config(rollout={"temperature": TEMPERATURE}, trainer=trainer))
    assert as_documented(policy) == ROWS[family]
    got = torch.zeros(len(batch.token_ids))
    for micro in micro_batches([policy], batch):
        logprobs, _ = policy(micro, torch.from_numpy(batch.token_ids)[micro.token_index])
        (logprobs * weights[micro.token_index]).sum().backward()
        got[micro.token_index] = logprobs.detach()
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
    off = (gradients(model) - expected_gradients).norm() / expected_gradients.norm()
    assert off < 1e-5


def test_a_copy_of_a_checkpointed_model_computes_by_its_own_weights(batch, make_config):
    """The average of an objective's proximal policy is such a copy."""
    policy = make_policy(tiny("opt"), make_config(trainer={"gradient_checkpointing": True}))
    copied = deepcopy(policy)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    micro = micro_batches([policy], batch)[0]
    targets = torch.from_numpy(batch.token_ids)[micro.token_index]
    assert (copied(micro, targets)[0] - policy(micro, targets)[0]).abs().min() > 0
    uniform = torch.full((len(targets),), -np.log(policy.head.out_features), dtype=torch.float32)
    torch.testing.assert_close(copied(micro, targets)[0], uniform)


def test_windows_show_in_the_text_part_of_a_model_that_has_others(make_config):
    """Beyond a window a shared prompt is not seen."""
    text = FAMILIES["gemma3_text"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    composite = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(composite, dtype=torch.float32).eval()
    assert not make_policy(model, make_config()).shares_prefixes


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "llama4_text"])
def test_a_model_that_cannot_be_packed_gets_a_row_for_each_sequence_beside_any_other_model(
    family, batch, make_config
):
    """Policy, critic and reference share micro-batches."""
    config = make_config(trainer={"gradient_checkpointing": True})
    policy, critic = make_policy(tiny("qwen3"), config), make_critic(tiny(family), config)
    torch.nn.init.normal_(critic.value_head.weight)
    assert policy.unpacked is None
    assert critic.unpacked is not None
    values = torch.zeros(len(batch.token_ids))
    logprobs = torch.zeros(len(batch.token_ids))
    for micro in micro_batches([policy, critic], batch):
        of_policy, of_critic = (
            policy(micro, torch.from_numpy(batch.token_ids)[micro.token_index]),
            critic(micro),
        )
        (of_policy[0].sum() + of_critic.sum()).backward()
        logprobs[micro.token_index], values[micro.token_index] = of_policy[0].detach(), of_critic.detach()
    expected = torch.zeros(len(batch.token_ids))
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end])[None]
        hidden = critic.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected[start + 1 : end] = critic.value_head(hidden[:-1]).squeeze(-1).detach()
    expected *= torch.from_numpy(batch.loss_mask)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    plain = plain_logprobs(policy.model, batch, temperature=1.0).detach()
    torch.testing.assert_close(logprobs, plain, rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in critic.value_head.parameters())


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma2"])
def test_a_whole_step_does_not_depend_on_the_budget_of_a_micro_batch(
    family, save_model, make_config, random_batch
):
    """Loaded from a folder, with a critic and a reference of other families, of which one is not packed."""
    path = save_model(tiny(family))
    other = save_model(tiny("mistral"), "other")
    weights = []
    for budget in (40, 400):
        config = make_config(
            path,
            critic={"path": str(other), "lr": 1e-3},
            objective={"advantage": "gae"},
            reference={"path": str(other), "where": "loss", "kl_coef": 0.1},
            trainer={"micro_batch_tokens": budget, "mini_batches": 2, "lr": 1e-3, "eps": 1e-4},
        )
        trainer = make_trainer(config)
        metrics = trainer.step(random_batch(0, max_response=3 * WINDOW))
        assert metrics["grad_norm"] > 0
        weights.append(trainer.weights())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-6)


def test_the_documentation_knows_every_family():
    assert list(ROWS) == list(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_trainer_will_do_is_known_from_the_configuration(family, make_config):
    """Of the tiny model, and of one in the sizes of the family's first release."""
    trainer, logits = ROWS[family]
    configs = [tiny_config(family)] if family in BARE else [tiny_config(family), AutoConfig.for_model(family)]
    for config in configs:
        found = FoundModel(ModelSource("model.path", family, False, ""), None, config)
        assert model_facts(found, "bfloat16").parameters > 0
        form = training_form(found, make_config(), has_head=True)
        assert (form.unpacked is not None) == (trainer == "unpacked")
        if config is configs[0]:
            assert form.caps_logits == (logits == "capped")
        beside = training_form(found, make_config(), has_head=False)
        assert beside == TrainingForm(form.unpacked)


@pytest.mark.parametrize(
    ("family", "kernel", "why"),
    [
        ("gemma2", "sdpa", "caps its attention's scores"),
        ("gemma2", "varlen", "caps its attention's scores"),
        ("gpt_oss", "sdpa", "GptOssForCausalLM cannot compute by it"),
        ("gpt_oss", "varlen", "wants s_aux"),
        ("mamba", "varlen", "no mask"),
    ],
)
def test_a_kernel_that_a_model_cannot_have_is_refused_from_the_configuration(
    family, kernel, why, make_config
):
    found = FoundModel(ModelSource("model.path", family, False, ""), None, tiny_config(family))
    with pytest.raises(ConfigError, match=f"model.attn_implementation={kernel}: .*{why}"):
        training_form(found, make_config(model={"attn_implementation": kernel}), has_head=True)


def test_what_the_trainer_would_refuse_is_refused_from_the_configuration(make_config):
    found = FoundModel(ModelSource("model.path", "some/bert", False, ""), None, AutoConfig.for_model("bert"))
    with pytest.raises(
        ConfigError, match=r"model.path=some/bert: BertLMHeadModel .* changes the hidden states"
    ):
        training_form(found, make_config(), has_head=True)
