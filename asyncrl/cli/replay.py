"""The command `asyncrl replay`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "replay",
        help="repeat a run's training step by step, on its recorded batches",
        description="Repeat a run's training in one process and without engines, on the batches that it "
        "recorded (those since its oldest kept checkpoint; with run.record=true or run.mode=inline all), and "
        "compare each step with the run's metrics. In float32 with one thread, the weights are the same, bit "
        "by bit.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--from-step",
        type=int,
        default=0,
        metavar="N",
        help="start from the checkpoint of step N (default: 0)",
    )
    parser.add_argument("--to-step", type=int, metavar="N", help="end after step N (default: the last)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if the weights differ from the run's at a checkpoint."""
    from asyncrl.runfiles.replay import replay

    print(f"{'step':>8} {'loss':>12} {'of the run':>12} {'grad norm':>12} {'of the run':>12}  weights")
    differs = False
    for step in replay(arguments.run_dir, arguments.from_step, arguments.to_step):
        words = {None: "", True: "the same as the checkpoint's", False: "NOT the same as the checkpoint's"}
        print(
            f"{step.step:8} {step.loss:12.6g} {step.recorded_loss:12.6g} {step.grad_norm:12.6g} "
            f"{step.recorded_grad_norm:12.6g}  {words[step.same_weights]}",
            flush=True,
        )
        differs |= step.same_weights is False
    return int(differs)
