"""`asyncrl train-reward`: trains a reward model from preference pairs."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    need = parser.add_argument_group("model and data")
    need.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="folder or hub name of a language model, or of a reward model to continue with",
    )
    need.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSONL; a row has `prompt` (a string or messages), `chosen` and `rejected`",
    )
    need.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder for the reward model"
    )
    need.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="for a model without a chat template"
    )
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=_positive, default=1, metavar="N", help="passes over the pairs (1)")
    how.add_argument("--steps", type=_positive, metavar="N", help="training steps, instead of epochs")
    how.add_argument("--lr", type=float, default=1e-5, help="peak learning rate (1e-5)")
    how.add_argument(
        "--batch-size",
        type=_positive,
        default=64,
        dest="batch_pairs",
        metavar="N",
        help="pairs per training step (64)",
    )
    how.add_argument(
        "--batch-tokens", type=_positive, default=16384, metavar="N", help="tokens per forward pass (16384)"
    )
    how.add_argument(
        "--max-tokens", type=_positive, default=4096, metavar="N", help="longer pairs are refused (4096)"
    )
    how.add_argument(
        "--held-out",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="share of the prompts whose pairs are held out for evaluation (0.1)",
    )
    how.add_argument("--seed", type=int, default=0, help="seed of the head, the split and the order (0)")
    how.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train (auto)"
    )
    how.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="compute dtype; the weights are float32 (auto: bfloat16 on a GPU)",
    )
    how.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations instead of storing them"
    )
    how.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
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
