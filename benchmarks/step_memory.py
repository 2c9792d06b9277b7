"""Peak memory of a training step by its output head: ours, a naive one, and one that is a single token wide.

    python benchmarks/step_memory.py [--vocabulary 32000] [--tokens 4096] [--hidden 512] [--layers 8] [--json
    FILE]

Each step (forward, backward, AdamW update) runs in a process of its own on a random float32 Qwen3 of the same
backbone.
  fused     the trainer's head: log-probabilities in chunks of `trainer.logit_chunk_tokens` tokens
  naive     all logits, then a log-softmax
  one token the same model with a vocabulary of one token behind its head: what the step takes without logits

Prediction: fused takes at most 1.3 times the memory of the head that is one token wide, weights and optimizer
included; naive takes several logits more (0.5 GiB each at the defaults).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what takes seconds to import, the measured processes import alone
    from transformers import Qwen3ForCausalLM

HEADS = ("fused", "naive", "one token")
CHUNK_TOKENS = 1024


def make_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
        max_position_embeddings=args.tokens,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    if args.head == "one token":
        model.lm_head = torch.nn.Linear(args.hidden, 1, bias=False)
    return model


def measure(args: argparse.Namespace) -> None:
    """One head, in this process: prints the peak in MiB above an idle process."""
    import psutil
    import torch
    from logprob_memory import MIB, PeakResident

    from asyncrl.trainer.models.policy import Policy

    idle_bytes = psutil.Process().memory_info().rss
    model = make_model(args)
    policy = Policy(model, temperature=1.0, chunk_tokens=CHUNK_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens))
    positions = torch.arange(args.tokens)[None]
    targets = torch.zeros(args.tokens, dtype=torch.int64) if args.head == "one token" else ids[0]
    with PeakResident() as peak:
        for _ in range(2):  # the optimizer's state is there from the second step on
            hidden = policy.hidden_states(ids, positions)[0]
            if args.head == "naive":
                logprobs = policy.head(hidden).log_softmax(-1).gather(-1, targets[:, None])
            else:
                logprobs, _ = policy.fused_head(hidden, targets)
            (-logprobs.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(json.dumps((peak.peak_bytes - idle_bytes) / MIB))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--head", choices=HEADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        return measure(args)
    peaks = {}
    for head in HEADS:
        command = [sys.executable, __file__, *sys.argv[1:], "--head", head]
        peaks[head] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, {args.layers} layers of {args.hidden}")
    for head, mib in peaks.items():
        print(f"{head:10}{mib:10,.0f} MiB{mib / peaks['one token']:8.2f}x")
    if args.json:
        args.json.write_text(json.dumps(peaks) + "\n")
    return None


if __name__ == "__main__":
    main()
