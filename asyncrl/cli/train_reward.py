"""`asyncrl train-reward`: trains a reward model from preference pairs."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    data = parser.add_argument_group("model and data")
    for option, kind, metavar, text in (
        (
            "--model",
            str,
            "PATH",
            "folder or hub name of a language model, or of a reward model to continue with",
        ),
        ("--data", Path, "FILE", "JSONL; a row has `prompt` (a string or messages), `chosen` and `rejected`"),
        ("--out", Path, "DIR", "new folder for the reward model"),
    ):
        data.add_argument(option, type=kind, required=True, metavar=metavar, help=text)
    data.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="for a model without a chat template"
    )
    training = parser.add_argument_group("training")
    for option, kind, default, text in (
        ("--epochs", _positive, 1, "passes over the pairs"),
        ("--steps", _positive, None, "training steps, instead of epochs"),
        ("--lr", float, 1e-5, "peak learning rate"),
        ("--batch-size", _positive, 64, "pairs per training step"),
        ("--batch-tokens", _positive, 16384, "tokens per forward pass"),
        ("--max-tokens", _positive, 4096, "longer pairs are refused"),
        ("--held-out", _share, 0.1, "share of the prompts whose pairs are held out for evaluation"),
        ("--seed", int, 0, "seed of the head, the split and the order"),
    ):
        shown = "" if default is None else f" ({default})"
        training.add_argument(option, type=kind, default=default, metavar="N", help=text + shown)
    training.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train (auto)"
    )
    training.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="compute dtype; the weights are float32 (auto: bfloat16 on a GPU)",
    )
    for flag, text in (
        ("--gradient-checkpointing", "recompute activations instead of storing them"),
        ("--trust-remote-code", "run code that comes with the model"),
    ):
        training.add_argument(flag, action="store_true", help=text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from asyncrl.reward.train.run import Settings, train_reward_model

    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    train_reward_model(settings, tell=lambda text: print(text, flush=True))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{share:g} must be at least 0 and less than 1")
    return share
