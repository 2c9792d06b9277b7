"""Warms the tiny model up: supervised learning from a sloppy teacher, with a new batch every step."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from asyncrl.tiny.tasks import Task

STEPS = 300
PEAK_LR = 4e-3
WARMUP_STEPS = 30
NOT_A_TARGET = -100


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rng: random.Random,
    tell: Callable[[float], None],
) -> None:
    """Train `model` in place on `STEPS` batches of the task's demonstrations. `tell` gets the share that is
    done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_share)
    model.train()
    for step in range(STEPS):
        tell(step / STEPS)
        token_ids, targets = _batch(tokenizer, task, rng)
        hidden = model.model(token_ids, use_cache=False).last_hidden_state
        wanted = targets != NOT_A_TARGET
        loss = F.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _lr_share(step: int) -> float:
    """Rises linearly over `WARMUP_STEPS`, then falls linearly to 2%."""
    return min((step + 1) / WARMUP_STEPS, max(0.02, 1 - step / STEPS))


def _batch(tokenizer: PreTrainedTokenizerBase, task: Task, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids int64[task.batch, L], and targets of the same shape: the next token if it belongs to the
    response, else `NOT_A_TARGET`. Padding is on the right, where a causal model's other positions do not see
    it."""
    problems = [task.sample(rng) for _ in range(task.batch)]
    prompts = tokenizer.apply_chat_template(
        [problem.row["prompt"] for problem in problems], add_generation_prompt=True, return_dict=False
    )
    responses = tokenizer([task.demonstrate(problem, rng) + tokenizer.eos_token for problem in problems])[
        "input_ids"
    ]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    token_ids = torch.full((task.batch, length), tokenizer.pad_token_id)
    targets = torch.full((task.batch, length), NOT_A_TARGET)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor(prompt + response)
        targets[row, start - 1 : end - 1] = torch.tensor(response)
    return token_ids, targets
