"""What a training step of configs/grlo.yaml computes, counted on the meta device, beside what it has to."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl import config as config_module
from asyncrl.trainer.critic.model import Critic
from asyncrl.trainer.kernels.logprob import LogitShape
from asyncrl.trainer.models.packed import _checkpoint_gradients, common_packing
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.packing.batch import FlatBatch, split_groups
from asyncrl.trainer.packing.mini_batch import mini_batch
from asyncrl.trainer.ranks import OneRank

GRLO = Path(__file__).parents[2] / "configs" / "grlo.yaml"
LAYERS = 2
"""Of the model's 36, which are alike."""
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
HEADS_WIDTH = QWEN3_4B.num_attention_heads * QWEN3_4B.head_dim
MLP = QWEN3_4B.hidden_size * QWEN3_4B.intermediate_size
PROJECTIONS = QWEN3_4B.hidden_size * 2 * (HEADS_WIDTH + QWEN3_4B.num_key_value_heads * QWEN3_4B.head_dim)

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Matrix products of attention: scores and weighted values; scores again, and gradients of weights, values,
queries and keys (Dao et al. 2022, arXiv 2205.14135)."""


def attention_flops(starts, query, products):
    """Of pieces that attend causally to themselves, each token to those before it and itself.

    That is what is useful. A kernel computes the whole of the blocks that the diagonal crosses, about 64 keys
    more a token, which is left out on both sides."""
    lengths = np.diff(starts.numpy().astype(np.int64))
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return products * 2 * pairs * query.shape[1] * query.shape[2]


def count_forward(q, k, v, q_starts, *args, **kwargs):
    return attention_flops(q_starts, q, FORWARD_PRODUCTS)


def count_backward(grad, q, k, v, out, lse, q_starts, *args, **kwargs):
    return attention_flops(q_starts, q, BACKWARD_PRODUCTS)


def count_addmm(total, a, b, *args, **kwargs):
    """torch's own formula does not know the result's dtype among the arguments."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


for formula in (count_forward, count_backward, count_addmm):
    formula._get_raw = True
FORMULAS = {
    torch.ops.aten.addmm: count_addmm,
    torch.ops.torch_attn._varlen_attn: count_forward,
    torch.ops.torch_attn._varlen_attn_backward: count_backward,
}


class Counted:
    """FLOPs of what runs inside, and the largest tensor that it makes."""

    def __enter__(self):
        self._flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._sizes = Largest()
        self._sizes.__enter__()
        self._flops.__enter__()
        return self

    def __exit__(self, *error):
        self._flops.__exit__(*error)
        self._sizes.__exit__(*error)
        self.flops, self.largest = self._flops.get_total_flops(), self._sizes.numel


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def grlo_batch(responses=1024, seed=0):
    """A batch as base models give it: lognormal prompts and responses, a tenth of them cut at 3,072
    tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(math.log(120), 0.8, responses), 8, 1024).astype(np.int64)
    answers = np.clip(rng.lognormal(math.log(900), 0.95, responses), 1, 3072).astype(np.int64)
    mask = np.concatenate([np.repeat([False, True], [p, a]) for p, a in zip(prompts, answers, strict=True)])
    return FlatBatch(
        token_ids=np.zeros(len(mask), np.int64),
        loss_mask=mask,
        behavior_logprobs=np.zeros(len(mask), np.float32),
        ages=np.zeros(len(mask), np.int64),
        offsets=np.append(0, np.cumsum(prompts + answers)),
        group_ids=np.arange(responses),
        rewards=np.zeros(responses),
        truncated=np.zeros(responses, bool),
        sampled=mask,
    )


def on_meta(kind, **options):
    """A model as the trainer sets it up for the preset, without weights."""
    with torch.device("meta"):
        decoder = Qwen3ForCausalLM(QWEN3_4B).bfloat16().eval()
        decoder.set_attn_implementation("varlen")
        model = kind(decoder, **options)
    _checkpoint_gradients(model.model)
    return model


@pytest.fixture(scope="module")
def policy():
    with pytest.MonkeyPatch.context() as patch:  # which looks at numbers, and there are none
        patch.setattr("asyncrl.trainer.models.policy.find_logit_shape", lambda model: LogitShape())
        return on_meta(Policy, temperature=1.0, chunk_tokens=1024)


@pytest.fixture(scope="module")
def critic():
    return on_meta(Critic)


def micros_of(flat, sequences, model, max_tokens):
    """On the meta device but for where pieces begin, which the formulas read."""
    packing = common_packing([model], max_tokens)
    mini = mini_batch(flat, sequences, packing, OneRank(torch.device("cpu")), 3072)
    return [
        replace(there, pieces=here.pieces) for here, there in zip(mini.on_host, mini.micros(), strict=True)
    ]


def useful(lengths, passes):
    """FLOPs of the layers for sequences of these lengths: 2 a multiply-add. passes: `forward`, or `train`,
    which is forward, again for the gradient (but for the MLP's last product, of which nothing is kept), and
    backward."""
    tokens, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    matrices = PROJECTIONS + 3 * MLP
    attention = 2 * pairs * HEADS_WIDTH
    forward = 2 * tokens * matrices + FORWARD_PRODUCTS * attention
    again = forward - 2 * tokens * MLP
    backward = 4 * tokens * matrices + BACKWARD_PRODUCTS * attention
    return LAYERS * {"forward": forward, "train": forward + again + backward}[passes]


@pytest.mark.slow
def test_a_step_of_grlo_computes_within_5_percent_of_what_it_has_to(policy, critic):
    config = config_module.load(GRLO)
    flat = grlo_batch(config.trainer.batch_groups)
    sequences = split_groups(flat, config.trainer.mini_batches, seed=0)[0]
    micros = micros_of(flat, sequences, policy, config.trainer.micro_batch_tokens)
    lengths = flat.trained_lengths()[sequences]
    trained = sum(len(micro.token_index) for micro in micros)
    head = 2 * trained * QWEN3_4B.vocab_size * QWEN3_4B.hidden_size
    with Counted() as step:
        for micro in micros:
            targets = torch.empty_like(micro.token_index)
            with torch.no_grad():
                policy(micro, targets)
                critic(micro)
            policy(micro, targets)[0].sum().backward()
            critic(micro).sum().backward()
    # The head: forward twice, then once more for the gradient, and the gradients of hidden states and weight.
    expected = 2 * useful(lengths, "forward") + 2 * useful(lengths, "train") + (2 + 3) * head
    assert expected <= step.flops < 1.05 * expected
    rounded = [micro.input_ids.shape[1] for micro in micros]
    assert sum(rounded) < 1.016 * lengths.sum()
    assert len(set(rounded)) <= 4


@pytest.mark.slow
def test_no_cost_grows_with_the_square_of_the_row(policy):
    flat = grlo_batch(64)
    everything = np.arange(flat.sequences)
    of_rows = {}
    for max_tokens in (8192, 65536):
        with Counted() as layers:
            for micro in micros_of(flat, everything, policy, max_tokens):
                policy.predicting_states(micro).sum().backward()
        of_rows[max_tokens] = layers.flops
    rows = micros_of(flat, everything, policy, 65536)
    assert max(micro.input_ids.shape[1] for micro in rows) > 60000
    assert layers.largest < 65536**2 / 4
    assert of_rows[65536] == pytest.approx(of_rows[8192], rel=0.02)
