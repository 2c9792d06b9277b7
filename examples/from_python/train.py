"""Trains the tiny model on a task of one's own, from prompts to evaluation, in one file.

asyncrl tiny-model                                  # builds models/tiny
python examples/from_python/train.py                # about half a minute on two CPU cores
python examples/from_python/train.py run.steps=20   # any setting can be overridden
"""

import json
import random
import sys
from pathlib import Path

import asyncrl


def first_is_last(completions, letters, **_):
    """1 for an answer of the same letters that begins with the last one in the alphabet, else 0."""
    answers = [completion[-1]["content"] for completion in completions]
    return [
        float(sorted(answer) == sorted(given) and answer[0] == max(given))
        for answer, given in zip(answers, letters, strict=True)
    ]


def write_prompts(path, rows=1000):
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            letters = "".join(rng.sample("abcdefghijklmnop", rng.randint(6, 10)))
            row = {"prompt": [{"role": "user", "content": f"sort {letters}"}], "letters": letters}
            print(json.dumps(row), file=file)


def main(overrides):
    prompts = Path("runs/from_python.jsonl")
    prompts.parent.mkdir(exist_ok=True)
    write_prompts(prompts)
    settings = {
        "run": {"name": "from-python", "steps": 60},
        "model": {"path": "models/tiny"},
        "data": {"path": str(prompts), "held_out_rows": 32},
        "reward": {"functions": [{"function": f"{__file__}:first_is_last"}]},
        "rollout": {"max_new_tokens": 24},
        "trainer": {"lr": 2e-4},
    }
    result = asyncrl.run(settings, overrides)

    print("\nThe best answer of the first step, and of the last one that was kept:")
    best = [sample for sample in asyncrl.read_samples(result.run_dir) if "best" in sample.chosen]
    for sample in (best[0], best[-1]):
        print(f"  step {sample.step}, reward {sample.reward:g}: {sample.response!r}")

    config = asyncrl.load(result.run_dir / "config.yaml")
    before, after = asyncrl.evaluate_model(config), asyncrl.evaluate_model(config, str(result.run_dir))
    print(f"On prompts that it was not trained on: {before.mean:.2f} before, {after.mean:.2f} after")


# Reward processes import this file for the reward function, and must not start a run by that.
if __name__ == "__main__":
    main(sys.argv[1:])
