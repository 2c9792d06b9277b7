"""Whole runs that learn from a teacher and not from rewards."""

from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncrl
from asyncrl.observe.metrics import read_metrics


@pytest.fixture
def teacher(tiny_folder, tmp_path):
    """A model that answers everything with letters in alphabetical order."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = tokenizer(["abcdefghijkl" * 4], return_tensors="pt")["input_ids"]
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_student_learns_from_its_teacher_alone_one_response_a_prompt(make_config, one_thread, teacher):
    config = make_config(
        *("run.mode=inline", "run.steps=25", "reward={functions: []}", "rollout.group_size=1"),
        *("trainer.batch_groups=16", "trainer.lr=3e-3", f"teacher.path={teacher}"),
    )
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    divergences = [line["teacher/kl"] for line in lines]
    assert max(line["staleness/max"] for line in lines) > 0
    assert mean(divergences[-5:]) < 0.85 * mean(divergences[:3])
    assert {line["reward/mean"] for line in lines} == {0.0}
