"""The first hour on a rented GPU: does all of it work, how fast, and as predicted?

    make gpu-check                                       on a machine with an NVIDIA GPU
    python benchmarks/gpu_check --device cpu --small     the same steps on a CPU, in small, as far as they go

Every step runs in a process of its own, with a deadline, and gives numbers, most of them with a prediction.
What steps have found is kept in one JSON file: started again, the check goes on with what is missing or has
failed. At the end there is one file to send: machine, versions, all results, the ends of all logs, without
the names of folders, user and host.

Predictions are for one H100 of 80 GB and Qwen3-0.6B's architecture. They were made without a GPU: where one
is missed, the prediction may be what is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from check_list import STEPS
from check_model import QWEN3_06B, SMALL
from check_report import Results, show, write_report
from check_runner import run_alone, run_here
from check_step import DONE, FAILED, NOT_THERE, Result

DEFAULT_OUT = Path(__file__).parents[1] / "results" / "gpu_check.json"


def main() -> int:
    arguments = _parse()
    if arguments.device == "cuda":
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not gpus:
            print("gpu-check: skipped, there is no NVIDIA GPU here that CUDA can use")
            return 0
    else:
        gpus = 0
    steps = {step.name: step for step in STEPS}
    size = SMALL if arguments.small else QWEN3_06B
    if arguments.child is not None:
        run_here(steps[arguments.steps[0]], size, arguments)
        return 0
    results = Results.open(arguments.out, arguments.device, arguments.small)
    with tempfile.TemporaryDirectory(prefix="asyncrl-gpu-check-") as scratch:
        for name in arguments.steps or steps:
            step, before = steps[name], results.steps.get(name)
            if before is not None and before.verdict in DONE and name not in arguments.again:
                print(f"{step.title}: done before ({before.verdict})")
                continue
            print(f"{step.title} ...", flush=True)
            if arguments.device == "cuda" and step.gpus > gpus:
                reason = f"it needs {step.gpus} GPUs, and there is {gpus}"
                results.keep(name, Result(NOT_THERE, reason))
            else:
                results.keep(name, run_alone(step, results.log(name), Path(scratch), arguments))
            show(step, results.steps[name])
    report = write_report(results, steps)
    print(f"results: {results.path}\nto send: {report}")
    return 1 if any(result.verdict == FAILED for result in results.steps.values()) else 0


def _parse() -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="steps:\n" + "\n".join(f"  {step.name:18}{step.title}" for step in STEPS),
    )  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of 40 thousand parameters")
    parser.add_argument(
        "--steps", nargs="+", choices=names, metavar="STEP", help="these alone, in this order"
    )
    parser.add_argument(
        "--again", nargs="+", choices=names, default=[], metavar="STEP", help="though they are done"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file that holds the results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
