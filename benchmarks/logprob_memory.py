"""Peak memory of the fused log-probabilities beside the naive head, forward and backward, each in its own
process.

    python benchmarks/logprob_memory.py [--vocabulary 32000] [--tokens 4096] [--json FILE]

"Peak" is the process's highest resident size above what it was just before the head ran (inputs included
there).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from asyncrl.trainer.kernels.logprob import token_logprobs

MIB = 2**20
SAMPLE_EVERY_S = 0.001


class PeakResident:
    """Samples this process's resident bytes from a thread while the block runs."""

    def __enter__(self) -> PeakResident:
        self._process = psutil.Process()
        self.before_bytes = self.peak_bytes = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = (hidden @ weight.T).float().log_softmax(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def measure(head: str, args: argparse.Namespace) -> dict[str, object]:
    """One forward and backward pass through `head`; run it in a fresh process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,))
    start = time.perf_counter()
    with PeakResident() as memory:
        if head == "fused":
            logprobs, entropy = token_logprobs(hidden, weight, targets, chunk_tokens=args.chunk_tokens)
        else:
            logprobs, entropy = naive(hidden, weight, targets)
        (logprobs.mean() - 0.01 * entropy.mean()).backward()
    return {
        "head": head,
        "peak_mib": round((memory.peak_bytes - memory.before_bytes) / MIB, 1),
        "wall_s": round(time.perf_counter() - start, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--only", choices=["fused", "naive"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    rows = []
    for head in ("naive", "fused"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", head]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
        rows.append(json.loads(done.stdout))
    logits_mib = args.tokens * args.vocabulary * 4 / MIB
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}; float32 logits of all: {logits_mib:.0f} MiB")
    print(f"{'head':<8}{'peak MiB':>10}{'wall s':>10}")
    for row in rows:
        print(f"{row['head']:<8}{row['peak_mib']:>10}{row['wall_s']:>10}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"settings": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
