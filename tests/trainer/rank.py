"""One trainer process: `rank.py RANK NAME.yaml`. Trains on the same batches whatever the config; rank 0 saves
the weights as `NAME.safetensors`, the metrics as `NAME.json` and the model as `NAME/`."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from batches import make_batch, with_true_logprobs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from asyncrl import config as settings
from asyncrl.trainer.backend import make_rank, make_trainer

STEPS = 3


def main(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    config = settings.load(path)
    rendezvous = path.with_suffix(".ranks")
    if rank:
        return make_rank(config, rank, rendezvous).follow()
    trainer = make_trainer(config, rendezvous)
    permuted = path.stem.endswith("permuted")
    metrics = [trainer.step(batch) for batch in batches(config.model.path, permuted)]
    weights = trainer.weights()
    parts = weights.items() if isinstance(weights, dict) else weights.parts()
    save_file({name: tensor.clone() for name, tensor in parts}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(metrics))
    trainer.save(path.with_suffix(""))
    return trainer.close()


def batches(model_path: str, permuted: bool):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    for seed in range(STEPS):
        batch = with_true_logprobs(make_batch(seed, groups=6, step=seed), model, seed=seed)
        yield dataclasses.replace(batch, groups=batch.groups[::-1]) if permuted else batch


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
