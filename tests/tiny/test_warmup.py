"""The warm-up's batches: demonstrations that share their prompt, each as likely as if it stood alone."""

import random
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from asyncrl.tiny.skill import demonstrations, sample_problem
from asyncrl.tiny.tasks import TASKS
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.tiny.warmup import NOT_A_TARGET, demonstrated


@torch.no_grad()
def test_a_demonstration_beside_others_is_as_likely_as_alone(make_qwen3):
    tokenizer = byte_tokenizer(512)
    model = make_qwen3(vocab_size=len(tokenizer))
    batch = demonstrated(tokenizer, TASKS["sorting"], random.Random(3))
    logits = model(batch.token_ids, position_ids=batch.positions, attention_mask=batch.sees).logits
    losses = F.cross_entropy(logits.mT, batch.targets, ignore_index=NOT_A_TARGET, reduction="none")
    rng = random.Random(3)
    problems = [sample_problem(rng) for _ in range(TASKS["sorting"].problems)]
    for row, problem in enumerate(problems):
        texts = [text + tokenizer.eos_token for text in demonstrations(problem, rng)]
        responses = tokenizer(texts)["input_ids"]
        wanted = batch.targets[row] != NOT_A_TARGET
        assert batch.targets[row, wanted].tolist() == [*chain(*responses)]
        beside = losses[row, wanted].split([len(response) for response in responses])
        prompt = tokenizer.apply_chat_template(
            problem.row["prompt"], add_generation_prompt=True, return_dict=False
        )
        for response, found in zip(responses, beside, strict=True):
            alone = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = F.cross_entropy(alone, torch.tensor(response), reduction="none")
            assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
