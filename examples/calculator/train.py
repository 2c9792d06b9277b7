"""Calculator: an episode in which the model may call a tool, a Python function.

    python examples/calculator/train.py                # a few minutes on two CPU cores
    python examples/calculator/train.py run.steps=20   # any setting can be overridden

The model is asked for products that it cannot work out. It has been warmed up on somebody who reaches for the
calculator now and then and makes the rest up; by reinforcement it is to learn to call the tool.
"""

import json
import random
import sys
from pathlib import Path

import asyncrl


def calculate(product: str) -> str:
    """Multiplies two numbers.

    Args:
        product: such as 12*34
    """
    a, _, b = product.partition("*")
    return str(int(a) * int(b))


async def episode(task, model):
    """1 for the right answer, however it was found."""
    conversation = await model.use_tools(task.prompt, [calculate], max_turns=3)
    return float(conversation[-1]["content"] == task.columns["answer"])


def draw(rng):
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return f"{a}*{b}", str(a * b)


def careless_pupil(rng):
    """A solution by somebody who calls the tool in two of five cases."""
    product, answer = draw(rng)
    messages = [{"role": "user", "content": product}]
    if rng.random() < 0.4:
        call = json.dumps({"name": "calculate", "arguments": {"product": product}})
        messages += [
            {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
            {"role": "tool", "content": answer},
        ]
    else:
        answer = str(rng.randint(121, 9801))
    return [*messages, {"role": "assistant", "content": answer}]


def main(overrides):
    from asyncrl.tiny.dialogues import build_on

    model = build_on("models/calculator", careless_pupil, batch=16)
    products = Path("runs/calculator.jsonl")
    products.parent.mkdir(exist_ok=True)
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(1000)]
    rows = [{"prompt": [{"role": "user", "content": product}], "answer": answer} for product, answer in drawn]
    products.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run": {"name": "calculator", "steps": 40},
        "model": {"path": str(model)},
        "data": {"path": str(products), "held_out_rows": 64},
        "rollout": {"episode": f"{__file__}:episode", "max_new_tokens": 96, "max_sequence_tokens": 256},
        "reward": {},  # the episode says what it earned
        "trainer": {"lr": 3e-4, "batch_groups": 16},
    }
    result = asyncrl.run(settings, overrides)
    config = asyncrl.load(result.run_dir / "config.yaml")
    before, after = asyncrl.evaluate_model(config), asyncrl.evaluate_model(config, str(result.run_dir))
    print(f"held-out products that were right: {before.mean:.2f} before, {after.mean:.2f} after")


# The processes of the episodes import this file for `episode`, and must not start a run by that.
if __name__ == "__main__":
    main(sys.argv[1:])
