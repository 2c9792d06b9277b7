"""One of several trainer processes. Trains one step on the same batch by each config `NAME.yaml` beside
`path`, all in one process group; rank 0 writes the gradients of each, as AdamW's first average has them, to
`NAME.safetensors` there."""

from pathlib import Path

import torch
from batches import make_batch, with_references, with_true_logprobs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from asyncrl import config as settings
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.make import load_models, make_training
from asyncrl.trainer.ranks import OneRank

START_TIMEOUT_S = 240.0


def gradients(config, ranks, learner) -> dict[str, torch.Tensor]:
    """By part and parameter. All ranks call it alike."""
    models = load_models(config)
    step, parts = make_training(config, models, learner, ranks)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    batch = with_references(with_true_logprobs(make_batch(0, groups=6), model))
    for number in range(1 if config.replay is None else 2):  # by the second one there is what to replay
        step.train(step.flatten(batch), number)
    return {
        f"{part}.{name}": tensor.detach().float().clone()
        for part, learned in parts.items()
        for kind, name, tensor in learned.tensors()
        if kind == "exp_avg"
    }


def alone(config) -> dict[str, torch.Tensor]:
    """Of plain torch, in this process."""
    ranks = OneRank(torch.device("cpu"))
    return gradients(config, ranks, lambda model: TorchLearner(model, config.trainer))


def main(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    from asyncrl.trainer.backends.deepspeed.backend import _learner
    from asyncrl.trainer.backends.deepspeed.group import RankGroup

    folder = path.parent
    configs = {one.stem: settings.load(one) for one in sorted(folder.glob("*.yaml"))}
    size = next(iter(configs.values())).trainer.ranks
    group = RankGroup(rank, size, folder / "rendezvous", torch.device("cpu"), START_TIMEOUT_S)
    for name, config in configs.items():
        found = gradients(config, group, lambda model, config=config: _learner(model, config, group))
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")
    group.close()
