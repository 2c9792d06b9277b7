"""Trainers that give up their memory between two steps, and take it back (`Trainer.offload`)."""

import gc

import pytest
import torch
from batches import make_batch, with_true_logprobs
from transformers import AutoModelForCausalLM

from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.host_memory import AREA_BYTES
from asyncrl.trainer.offload import Parking

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
    # By their types: `isinstance` fails at a weak reference to what is gone, wherever it comes from.
    found = (t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batches = [with_true_logprobs(make_batch(step, groups=4, step=step), model, seed=step) for step in (0, 1)]
    return lambda **sections: (make_trainer(make_config(path, **TURNS, **sections)), batches)


@pytest.mark.parametrize("sections", [SECTIONS, ADAPTED], ids=["critic-ewma", "lora"])
def test_what_follows_is_as_if_nothing_had_been_given_up(make, sections):
    """On a CPU, too, values move to another place, and references to the old one would show."""
    after = []
    for offloads in (False, True):
        trainer, batches = make(**sections)
        for batch in batches:
            if offloads:
                trainer.offload()
                trainer.reload()
            trainer.step(batch)
        after.append({name: weight.clone() for name, weight in trainer.weights().parts()})
    assert all(torch.equal(weight, after[1][name]) for name, weight in after[0].items())


def test_nothing_of_any_size_stays(make):
    """All that the trainer has made lies where it is parked: masters, AdamW's state, the averaged weights."""
    gc.collect()
    before = storages()
    trainer, [batch, _] = make(**SECTIONS)
    trainer.step(batch)

    def large():
        return {place: n for place, n in storages().items() if place not in before and n > SMALL_BYTES}

    assert len(large()) > 10
    trainer.offload()
    assert set(large().values()) == {AREA_BYTES}
    trainer.reload()
    assert len(large()) > 10


def test_tensors_come_back_where_they_were_and_their_host_memory_is_the_same_every_time():
    """Named twice, and with others of their shape that come later: each keeps its values."""
    first, second, late = torch.arange(3.0), torch.tensor(7.0), torch.arange(3.0) + 5
    parking, places = Parking(), []
    for tensors in ([first, second, first], [late, first, second]):
        before = [tensor.clone() for tensor in tensors]
        parking.put(tensors)
        places.append({tensor.data_ptr() for tensor in tensors})
        assert all(map(torch.equal, tensors, before))
        parking.bring_back()
        assert all(map(torch.equal, tensors, before))
        assert not places[-1] & {tensor.data_ptr() for tensor in tensors}
    assert places[0] < places[1]
