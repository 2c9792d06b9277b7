"""Calculator: an episode in which the model may call a tool, a Python function.

    python examples/calculator/train.py                # a few minutes on two CPU cores
    python examples/calculator/train.py run.steps=20   # any setting can be overridden

The model is asked for products that it cannot work out. It has been warmed up on three pupils: one has the
calculator do it, one does so and mixes up the digits, and one makes the answer up. By reinforcement it is to
learn to call the tool, and to call it right. Held-out products that were right in three runs:
0.29 and 0.30 before, 0.95 to 0.97 after.
"""

import json
import random
import sys
from pathlib import Path

import asyncrl


def times(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: the one
        b: the other
    """
    return a * b


async def episode(task, model):
    """1 for the right answer, however it was found."""
    *_, last = await model.use_tools(task.prompt, [times], max_turns=3)
    return float(last["role"] == "assistant" and last["content"] == task.columns["answer"])


def draw(rng):
    return rng.randint(32, 99), rng.randint(32, 99)


def some_pupil(rng):
    """A solution of one of the three."""
    a, b = draw(rng)
    messages = [{"role": "user", "content": f"{a}*{b}"}]
    kind = rng.choice(["careful", "careless", "idle"])
    if kind == "idle":
        return [*messages, {"role": "assistant", "content": str(rng.randint(1024, 9801))}]
    if kind == "careless":
        a = int(str(a)[::-1])
    call = json.dumps({"name": "times", "arguments": {"a": a, "b": b}})
    return [
        *messages,
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "tool", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def main(overrides):
    from asyncrl.tiny.dialogues import build_on

    model = build_on("models/calculator", some_pupil, batch=32)
    products = Path("runs/calculator.jsonl")
    products.parent.mkdir(exist_ok=True)
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(1000)]
    rows = [{"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)} for a, b in drawn]
    products.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run": {"name": "calculator", "steps": 60},
        "model": {"path": str(model)},
        "data": {"path": str(products), "held_out_rows": 64},
        "rollout": {"episode": f"{__file__}:episode", "max_new_tokens": 96, "max_sequence_tokens": 256},
        "reward": {},  # the episode says what it earned
        # At a constant rate, one of five runs forgot it all once it had learnt it.
        "trainer": {"lr": 3e-4, "lr_schedule": "linear", "batch_groups": 8},
    }
    result = asyncrl.run(settings, overrides)
    config = asyncrl.load(result.run_dir / "config.yaml")
    before, after = asyncrl.evaluate_model(config), asyncrl.evaluate_model(config, str(result.run_dir))
    print(f"held-out products that were right: {before.mean:.2f} before, {after.mean:.2f} after")


# The processes of the episodes import this file for `episode`, and must not start a run by that.
if __name__ == "__main__":
    main(sys.argv[1:])
