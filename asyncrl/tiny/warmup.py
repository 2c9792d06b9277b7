"""Warms the tiny model up: supervised learning from a sloppy teacher, with a new batch every step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from asyncrl.tiny.tasks import Task

STEPS = 120
MATRIX_LR, OTHER_LR = 0.03, 0.01
"""Peaks, of Muon and of AdamW."""
RISING_STEPS = 10
NOT_A_TARGET = -100


def warm_up(
    model: Qwen3ForCausalLM,
    make_batch: Callable[[random.Random], Batch],
    rng: random.Random,
    tell: Callable[[float], None],
) -> None:
    """Train `model` in place on `STEPS` batches. `tell` gets the share that is done."""
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_share) for optimizer in optimizers]
    model.train()
    for step in range(STEPS):
        tell(step / STEPS)
        batch = make_batch(rng)
        hidden = model.model(
            batch.token_ids, position_ids=batch.positions, attention_mask=batch.sees, use_cache=False
        ).last_hidden_state
        wanted = batch.targets != NOT_A_TARGET
        loss = F.cross_entropy(model.lm_head(hidden[wanted]), batch.targets[wanted])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
    model.eval()


def _optimizers(model: Qwen3ForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al. 2024) for the layers' matrices: with AdamW for them, too, it takes over 300 steps
    to learn as much. AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    return (
        torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.9, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def _lr_share(step: int) -> float:
    """Rises linearly over `RISING_STEPS`, then falls linearly to 2%."""
    return min((step + 1) / RISING_STEPS, max(0.02, 1 - step / STEPS))


class Batch(NamedTuple):
    """B rows of L tokens, padded on the right."""

    token_ids: Tensor
    """int64[B, L]"""
    targets: Tensor
    """int64[B, L]: the next token if it belongs to a demonstration, else `NOT_A_TARGET`."""
    positions: Tensor | None = None
    """int64[B, L]; None counts each row from 0."""
    sees: Tensor | None = None
    """bool[B, 1, L, L]: which token attends to which; None is every earlier one."""


def demonstrated(tokenizer: PreTrainedTokenizerBase, task: Task, rng: random.Random) -> Batch:
    """A batch of a task: in each row a prompt, then its demonstrations one after the other. Each goes on from
    the prompt and sees nothing of the others, so the prompt is computed once."""
    problems = [task.sample(rng) for _ in range(task.problems)]
    prompts = tokenizer.apply_chat_template(
        [problem.row["prompt"] for problem in problems], add_generation_prompt=True, return_dict=False
    )
    rows = []
    for problem, (*prompt, last) in zip(problems, prompts, strict=True):
        # The prompt's last token, from which a demonstration's first one is predicted, is in every branch.
        token_ids, positions, branches = [*prompt], [*range(len(prompt))], [0] * len(prompt)
        targets = [NOT_A_TARGET] * len(prompt)
        texts = [text + tokenizer.eos_token for text in task.demonstrations(problem, rng)]
        for branch, response in enumerate(tokenizer(texts)["input_ids"], start=1):
            token_ids += [last, *response[:-1]]
            positions += range(len(prompt), len(prompt) + len(response))
            branches += [branch] * len(response)
            targets += response
        rows.append((token_ids, positions, branches, targets))
    padding = (tokenizer.pad_token_id, 0, -1, NOT_A_TARGET)
    token_ids, positions, branches, targets = (
        pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=value)
        for column, value in zip(zip(*rows, strict=True), padding, strict=True)
    )
    own, above = branches[:, None, :, None], branches[:, None, None, :]
    return Batch(token_ids, targets, positions, ((own == above) | (above == 0)).tril())
