"""Models with random weights, made on the spot, and runs and batches for them: nothing is downloaded."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asyncrl.config import Config, from_tree
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and how much work a step is."""

    dtype: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    groups: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    running: int
    """Requests that decode during a weight update."""
    micro_batch_tokens: int
    long_tokens: int
    """Longest response of a batch that was never sampled (`random_batch`)."""


QWEN3_06B = Size(
    "bfloat16", 151_936, 1024, 3072, 28, 16, 8, 128, 64, 16, 8, 64, 256, 32, 16_384, 3072
)  # fmt: skip
QWEN3_4B_STACK = Size(
    "bfloat16", 151_936, 2560, 9728, 12, 32, 8, 128, 64, 16, 8, 64, 256, 32, 16_384, 3072
)  # fmt: skip
"""Twelve of Qwen3-4B's 36 layers: what plain torch trains on one GPU of 80 GB."""
SMALL = Size("float32", 300, 32, 64, 2, 4, 2, 32, 6, 2, 4, 8, 12, 3, 128, 24)


def make_model(folder: Path, size: Size) -> Path:
    """A random model with a tokenizer, and prompts for it, in a folder that may hold it already."""
    if (folder / "prompts.jsonl").exists():
        return folder
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from asyncrl.tiny.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, size.dtype))
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # a progress bar
        model.save_pretrained(folder)
    byte_tokenizer(8192).save_pretrained(folder)
    text = "x" * (size.prompt_tokens - 4)
    rows = [json.dumps({"prompt": f"{i:03}{text}", "answer": ""}) for i in range(4 * size.groups)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return folder


def make_config(folder: Path, size: Size, device: str, scratch: Path, *overrides: str) -> Config:
    """A run on the model in `folder`; its run directories lie in `scratch`."""
    tree = {
        "run": {"steps": 3, "root": str(scratch / "runs")},
        "model": {"path": str(folder), "dtype": size.dtype},
        "data": {"path": str(folder / "prompts.jsonl")},
        "reward": {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}]},
        "rollout": {
            "device": device,
            "slots": size.slots,
            "group_size": size.group_size,
            "max_new_tokens": size.new_tokens,
        },
        "trainer": {
            "device": device,
            "batch_groups": size.groups,
            "gradient_checkpointing": True,
            "micro_batch_tokens": size.micro_batch_tokens,
            "lr": 1e-5,
        },
    }
    return from_tree(tree, overrides=overrides)


def random_batch(step: int, size: Size) -> Batch:
    """A batch as if the newest version had sampled it: ragged responses of random tokens, with the
    log-probability that a random model gives to each, and rewards made up."""
    rng = np.random.default_rng(step)
    groups = []
    for i in range(size.groups):
        prompt = rng.integers(0, size.vocab_size, size.prompt_tokens)
        members = []
        for j in range(size.group_size):
            sampled = int(rng.integers(size.long_tokens // 8, size.long_tokens + 1))
            tokens = np.concatenate([prompt, rng.integers(0, size.vocab_size, sampled)])
            is_sampled = np.arange(len(tokens)) >= len(prompt)
            members.append(
                Trajectory(
                    token_ids=tokens.astype(np.int32),
                    loss_mask=is_sampled,
                    behavior_logprobs=np.where(is_sampled, -np.log(size.vocab_size), 0).astype(np.float32),
                    versions=(VersionSpan(len(prompt), sampled, step),),
                    finish_reason=FinishReason.STOP,
                    reward=float(j % 3),
                )
            )
        groups.append(Group(i, i, members))
    return Batch(step, step, step, tuple(groups))


def tokens_of(batch: Batch) -> int:
    """All tokens that a step on it computes, prompts included."""
    return sum(len(t.token_ids) for group in batch.groups for t in group.trajectories)
