"""Guess the number: an episode of several turns, written as a class with `reset` and `step`.

    python examples/guess_number/train.py                # a few minutes on two CPU cores
    python examples/guess_number/train.py run.steps=20   # any setting can be overridden

The model has four guesses for a number from 1 to 9, and is told after each where the number can still be. It
has been warmed up on a player who often does not listen; by reinforcement it is to learn that.
"""

import json
import random
import sys
from pathlib import Path

import asyncrl

HIGHEST, GUESSES = 9, 4
PROMPT = [{"role": "user", "content": f"guess 1 to {HIGHEST}"}]


def narrowed(guess, secret, low, high):
    """The range that is left after a wrong guess."""
    return (max(low, guess + 1), high) if secret > guess else (low, min(high, guess - 1))


class Game:
    def reset(self, task):
        """What the model reads first."""
        self.secret, self.left, self.range = task.columns["secret"], GUESSES, (1, HIGHEST)
        return task.prompt

    def step(self, reply):
        """What it is told then, what the guess earned, and whether the game is over."""
        self.left -= 1
        if not reply.text.isdecimal():
            return None, 0.0, True
        guess = int(reply.text)
        if guess == self.secret:
            return None, 1.0, True
        self.range = narrowed(guess, self.secret, *self.range)
        return "guess {} to {}".format(*self.range), 0.0, self.left == 0


def careless_player(rng):
    """A game of somebody who listens every second time."""
    secret, (low, high), messages = rng.randint(1, HIGHEST), (1, HIGHEST), list(PROMPT)
    for _ in range(GUESSES):
        guess = rng.randint(low, high) if rng.random() < 0.5 else rng.randint(1, HIGHEST)
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            break
        low, high = narrowed(guess, secret, low, high)
        messages.append({"role": "user", "content": f"guess {low} to {high}"})
    return messages


def main(overrides):
    from asyncrl.tiny.dialogues import build_on

    model = build_on("models/guess_number", careless_player, batch=16)
    games = Path("runs/guess_number.jsonl")
    games.parent.mkdir(exist_ok=True)
    rng = random.Random(0)
    rows = [{"prompt": PROMPT, "secret": rng.randint(1, HIGHEST)} for _ in range(1000)]
    games.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run": {"name": "guess-number", "steps": 40},
        "model": {"path": str(model)},
        "data": {"path": str(games), "held_out_rows": 64},
        "rollout": {"episode": f"{__file__}:Game", "max_new_tokens": 4, "max_sequence_tokens": 256},
        "reward": {},  # the episode says what it earned
        "trainer": {"lr": 3e-4, "batch_groups": 16},
    }
    result = asyncrl.run(settings, overrides)
    config = asyncrl.load(result.run_dir / "config.yaml")
    before, after = asyncrl.evaluate_model(config), asyncrl.evaluate_model(config, str(result.run_dir))
    print(f"held-out games won: {before.mean:.2f} before, {after.mean:.2f} after")


# The processes of the episodes import this file for the game, and must not start a run by that.
if __name__ == "__main__":
    main(sys.argv[1:])
