"""The long task, its sloppy teacher and its reward function."""

import itertools
import random
import statistics

from asyncrl.tiny import build, warmup
from asyncrl.tiny.shifting import (
    ShiftingProblem,
    demonstrations,
    ends,
    right_lines,
    sample_problem,
    shifted,
)


def test_an_answer_shifts_the_word_until_its_first_letter_is_the_last():
    assert ShiftingProblem("mapc").answer == "nbad\nocbe\npdcf"
    lengths = [len(sample_problem(random.Random(seed)).answer) for seed in range(200)]
    assert min(lengths) == 8 * 9 - 1
    assert max(lengths) == 15 * 9 - 1


def test_the_reward_is_the_share_of_lines_before_the_first_wrong_one():
    answer = ShiftingProblem("mapc").answer
    responses = {
        answer: 1,
        f" {answer}\n": 1,
        "nbad\nocbe": 2 / 3,
        "nbad\nocbb\npdcf": 1 / 3,
        f"{answer}\naaaa": 2 / 3,  # it should have ended
        "": 0,
        "nbad ocbe pdcf": 0,
    }
    assert right_lines([*responses], [answer] * len(responses)) == [*responses.values()]
    assert right_lines([[{"role": "assistant", "content": answer}]], [answer]) == [1]


def test_the_teacher_is_right_about_half_of_the_way_and_goes_on_from_its_mistakes():
    rng, shares = random.Random(0), []
    for _ in range(2000):
        problem = sample_problem(rng)
        (response,) = demonstrations(problem, rng)
        shares += right_lines([response], [problem.answer])
        lines = [problem.word, *response.split("\n")]
        assert ends(lines[-1])
        assert not any(ends(line) for line in lines[:-1])
        for before, line in itertools.pairwise(lines):
            assert all(b in (a, shifted(a), shifted(a, -1)) for a, b in zip(before, line, strict=True))
    assert 0.45 < statistics.fmean(shares) < 0.57


def test_the_model_of_each_task_has_its_own_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "STEPS", 2)
    folder = build(tmp_path / "tiny", task="shifting", prompts=3)
    made = (folder / "model.safetensors").stat().st_ino
    assert "shift " in (folder / "prompts.jsonl").read_text()
    build(folder, task="shifting", prompts=3)
    assert (folder / "model.safetensors").stat().st_ino == made
    build(folder, prompts=3)
    assert "sort " in (folder / "prompts.jsonl").read_text()
