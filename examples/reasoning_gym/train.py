"""A task of the package `reasoning-gym`, by its name: how many 1 bits has a number?

    pip install 'asyncrl[reasoning-gym]'
    python examples/reasoning_gym/train.py                # a few minutes on two CPU cores
    python examples/reasoning_gym/train.py run.steps=20   # any setting can be overridden

The package generates the questions and scores the answers; any of its hundred tasks can be named. The tiny
model has been warmed up on a pupil who writes the number in binary before the answer one time in three, and
guesses otherwise. By reinforcement it is to learn to think first. (Held-out questions are about the same few
numbers.) Held-out answers that were right in three runs: 0.47 to 0.53 before, 0.97 to 0.98 after.
"""

import sys

import reasoning_gym

import asyncrl

TASK, OPTIONS = "count_bits", {"max_n": 15}
QUESTIONS = reasoning_gym.create_dataset(TASK, **OPTIONS, size=10**9, seed=1)


def some_pupil(rng):
    """A question of the task, with an answer that has been thought about or, twice as often, has not."""
    question = QUESTIONS[rng.randrange(len(QUESTIONS))]
    if rng.random() < 1 / 3:
        answer = f"{question['metadata']['number']:b} <answer>{question['answer']}</answer>"
    else:
        answer = f"<answer>{rng.randint(1, 4)}</answer>"
    return [
        {"role": "user", "content": question["question"]},
        {"role": "assistant", "content": answer},
    ]


def main(overrides):
    from asyncrl.tiny.dialogues import build_on

    model = build_on("models/reasoning_gym", some_pupil, batch=32)
    settings = {
        "run": {"name": "reasoning-gym", "steps": 50},
        "model": {"path": str(model)},
        "data": {
            "path": f"reasoning-gym:{TASK}",
            "options": {**OPTIONS, "size": 1000},
            "held_out_rows": 64,
        },
        "rollout": {"max_new_tokens": 32},
        "reward": {"functions": [{"function": "asyncrl.reward.verifiers.reasoning_gym:reasoning_gym"}]},
        # At a constant rate it later forgot some of what it had learnt.
        "trainer": {"lr": 3e-4, "lr_schedule": "linear", "batch_groups": 8},
    }
    result = asyncrl.run(settings, overrides)
    config = asyncrl.load(result.run_dir / "config.yaml")
    before, after = asyncrl.evaluate_model(config), asyncrl.evaluate_model(config, str(result.run_dir))
    print(f"held-out answers that were right: {before.mean:.2f} before, {after.mean:.2f} after")


if __name__ == "__main__":
    main(sys.argv[1:])
