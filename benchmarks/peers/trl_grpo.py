"""One run of TRL's GRPOTrainer, for `benchmarks/against_trl.py`, in an environment with TRL, without AsyncRL.

    python trl_grpo.py SETTINGS.json

Prints a JSON line for each training step: when it ended (seconds of a monotonic clock) and its mean reward.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def exact_match(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """As `asyncrl.tiny.skill.exact_match`."""
    return [float(c[-1]["content"].strip() == right) for c, right in zip(completions, answer, strict=True)]


class Steps(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            print(json.dumps({"at_s": time.monotonic(), "reward": logs["reward"]}), flush=True)


def main() -> None:
    s = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(s["threads"])
    config = GRPOConfig(
        output_dir=s["out"],
        max_steps=s["steps"],
        per_device_train_batch_size=s["prompts"] * s["group_size"],
        num_generations=s["group_size"],
        max_completion_length=s["max_new_tokens"],
        learning_rate=s["lr"],
        warmup_steps=s["warmup_steps"],
        lr_scheduler_type="linear",
        temperature=1.0,
        beta=0.0,
        seed=s["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=s["model"],
        reward_funcs=exact_match,
        args=config,
        train_dataset=load_dataset("json", data_files=s["data"], split="train"),
        callbacks=[Steps()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
