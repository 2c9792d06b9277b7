"""Trainers that give up their memory between two steps, and take it back (`Trainer.offload`)."""

import gc

import pytest
import torch
from batches import make_batch, with_true_logprobs
from transformers import AutoModelForCausalLM

from asyncrl.trainer import averaged, offload
from asyncrl.trainer.backend import make_trainer

SECTIONS = {
    "model": {"dtype": "bfloat16"},
    "objective": {"advantage": "vtrace", "proximal": "ewma"},
    "critic": {"lr": 1e-3},
    "trainer": {"lr": 1e-3},
}
ADAPTED = {"trainer": {"lr": 1e-3, "lora": {"rank": 4}}}
TURNS = {"placement": {"colocate": "turns"}, "rollout": {"kv_on_update": "recompute"}}
SMALL_BYTES = 512


def storages():
    """Bytes of all that tensors refer to, by where it lies."""
    found = (t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def elsewhere(tensors, device):
    """In the place of `offload.move`: on a CPU there is nowhere else to go, so values get another place."""
    for tensor in tensors:
        tensor.data = tensor.data.clone()


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batches = [with_true_logprobs(make_batch(step, groups=4, step=step), model, seed=step) for step in (0, 1)]
    return lambda **sections: (make_trainer(make_config(path, **TURNS, **sections)), batches)


@pytest.mark.parametrize("sections", [SECTIONS, ADAPTED], ids=["critic-ewma", "lora"])
def test_what_follows_is_as_if_nothing_had_been_given_up(make, monkeypatch, sections):
    after = []
    for offloads in (False, True):
        trainer, batches = make(**sections)
        for batch in batches:
            if offloads:
                with monkeypatch.context() as patch:
                    for module in (offload, averaged):
                        patch.setattr(module, "move", elsewhere)
                    trainer.offload()
                    trainer.reload()
            trainer.step(batch)
        after.append({name: weight.clone() for name, weight in trainer.weights().parts()})
    assert all(torch.equal(weight, after[1][name]) for name, weight in after[0].items())


def test_nothing_of_any_size_stays(make, monkeypatch):
    """Everything that the trainer has made is asked to move: masters, AdamW's state, the averaged weights."""
    gc.collect()
    before = storages()
    trainer, [batch, _] = make(**SECTIONS)
    trainer.step(batch)

    def large():
        return {place: n for place, n in storages().items() if place not in before and n > SMALL_BYTES}

    def away(tensors, device):
        for tensor in tensors:
            tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)

    for module in (offload, averaged):
        monkeypatch.setattr(module, "move", away)
    assert len(large()) > 10
    trainer.offload()
    assert large() == {}
