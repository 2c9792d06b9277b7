"""One trainer process, by its config `NAME.yaml`. Goes on from the snapshot in `folder`, if any, and trains
steps `first` to `last - 1` on the same batches whatever the config.

Rank 0 saves the weights as `NAME.safetensors` and the metrics as `NAME.json`, and writes the snapshot before
each step K, and that after the last, into `NAME/step_K`, beside the step.
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from batches import make_batch, with_kept_sets, with_true_logprobs
from namespaces import OtherHost
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from asyncrl import config as settings
from asyncrl.cluster.remote.call import with_ways_to_ranks
from asyncrl.trainer.backend import backend_of, make_trainer
from asyncrl.weights.adapters import BaseModel


def main(
    rank: int,
    path: Path,
    first: int,
    last: int,
    folder: Path | None = None,
    other: OtherHost | None = None,
) -> None:
    """other: where the second half of the ranks are."""
    torch.set_num_threads(1)
    config = settings.load(path)
    if other is not None:
        is_there = 2 * rank >= config.trainer.ranks and rank > 0
        if is_there:
            other.enter()
        os.environ.update(with_ways_to_ranks({}, other.there if is_there else other.here))
    rendezvous = path.with_suffix(".ranks")
    if rank:
        return backend_of(config).make_rank(config, rank, rendezvous).follow()
    trainer = make_trainer(config, rendezvous)
    if folder:
        trainer.restore(folder)
    metrics = []
    with ThreadPoolExecutor(1) as writer:
        for step, batch in enumerate(batches(config.model.path, first, last), start=first):
            written = writer.submit(write, trainer.snapshot(), path.with_suffix("") / f"step_{step}")
            metrics.append(trainer.step(dataclasses.replace(batch, groups=order(batch.groups, path))))
            written.result()
    write(trainer.snapshot(), path.with_suffix("") / f"step_{last}")
    weights = {name: tensor.clone() for name, tensor in trainer.weights().parts()}
    if config.trainer.lora is not None:  # what engines merge is what is computed with here, or they refuse it
        BaseModel(config.model, config.trainer.lora).merged(last, weights)
    save_file(weights, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(metrics))
    return trainer.close()


def write(snapshot, folder: Path) -> None:
    folder.mkdir(parents=True)
    snapshot.write(folder)


def batches(model_path: str, first: int, last: int):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for step in range(first, last):
        batch = with_true_logprobs(make_batch(step, groups=6, step=step), model, seed=step)
        yield with_kept_sets(batch) if step % 2 else batch


def order(groups: tuple, path: Path) -> tuple:
    return groups[::-1] if path.stem.endswith("permuted") else groups
