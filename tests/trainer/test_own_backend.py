"""What every trainer backend promises, held against those that compute in one process and a user's own; and
what its spec is asked for."""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncrl
from asyncrl.config import Section, load
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.trainer.backend import BackendSpec
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.packing.batch import check_staleness, flatten
from asyncrl.trainer.state import RestoreError
from asyncrl.weights.hashes import hash_weights
from asyncrl.weights.source import untied


class ReinforceSettings(Section):
    step_size: float
    """Of plain gradient descent."""


class Held:
    def __init__(self, trainer):
        self.model, self.tokenizer = deepcopy(trainer.model), trainer.tokenizer

    def write(self, folder):
        self.model.save_pretrained(folder / "hf")
        self.tokenizer.save_pretrained(folder / "hf")
        (folder / "training").mkdir()

    def weights_hash(self):
        weights = untied(self.model.state_dict())
        return hash_weights(weights, weights.get)


class ReinforceTrainer:
    """Gradient descent on what is rewarded above the mean, a sequence at a time."""

    def __init__(self, config):
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.step_size = ReinforceSettings.model_validate(config.trainer.settings).step_size
        self.max_staleness = config.staleness.max_staleness

    def step(self, batch, total_steps=None):
        flat = flatten(batch)
        check_staleness(flat, self.max_staleness)
        loss = torch.tensor(0.0)
        for s, (start, end) in enumerate(zip(flat.offsets[:-1], flat.offsets[1:], strict=True)):
            ids, mask = (torch.from_numpy(array[start:end]) for array in (flat.token_ids, flat.loss_mask))
            logprobs = self.model(ids[None]).logits[0, :-1].log_softmax(-1)
            sampled = logprobs.gather(1, ids[1:, None])[:, 0] * mask[1:]
            loss = loss - (flat.rewards[s] - flat.rewards.mean()) * sampled.sum() / flat.trained_tokens
        parameters = list(self.model.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= self.step_size * gradient
        names = ("ess", "ratio/mean", "kl/behavior", "clip_frac", "entropy")
        return dict(batch_metrics(batch, flat)) | dict.fromkeys(names, math.nan) | {"loss": loss.item()}

    def weights(self):
        return untied(self.model.state_dict())

    def canary(self):
        return None

    def snapshot(self):
        return Held(self)

    def restore(self, folder):
        if not (folder / "training").exists():
            raise RestoreError(f"{folder} holds no state")
        load_model(self.model, folder / "hf" / "model.safetensors", strict=False)

    def close(self): ...


class Reinforce(BackendSpec):
    settings = ReinforceSettings
    saves_memory = ("buy a GPU",)

    def make(self, config, rendezvous):
        return ReinforceTrainer(config)

    def impossible(self, config):
        yield from super().impossible(config)
        if config.trainer.mini_batches > 1:
            yield "trainer.mini_batches: one update a step; use trainer.mini_batches=1"


SPEC = Reinforce()
NOT_A_SPEC = ReinforceSettings
OWN = f"{__file__}:SPEC"
BACKENDS = {
    "torch": {},
    "paced": {"rollout": {"engine": "paced"}, "trainer": {"paced": {"step_s": 0.01}}},
    "own": {"trainer": {"settings": {"step_size": 0.5}}},
}


@pytest.fixture(params=BACKENDS)
def make(request, make_qwen3, save_model, make_config):
    """Makes the same trainer again and again."""
    sections = deepcopy(BACKENDS[request.param])
    sections.setdefault("trainer", {})["backend"] = OWN if request.param == "own" else request.param
    config = make_config(save_model(make_qwen3()), **sections)
    return lambda: asyncrl.trainer.backend.make_trainer(config)


def test_a_step_changes_the_weights_that_are_there_and_no_snapshot(make, random_batch):
    trainer = make()
    weights, snapshot = trainer.weights(), trainer.snapshot()
    before, was = {name: tensor.clone() for name, tensor in weights.items()}, snapshot.weights_hash()
    metrics = trainer.step(random_batch(0))
    assert metrics["trained_tokens"] > 0
    assert any(not torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert snapshot.weights_hash() == was != trainer.snapshot().weights_hash()


def test_another_goes_on_from_what_a_snapshot_wrote(make, random_batch, tmp_path):
    first, second = make(), make()
    first.step(random_batch(0))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    first.snapshot().write(folder)
    second.restore(folder)
    for trainer in (first, second):
        trainer.step(random_batch(1))
    assert first.snapshot().weights_hash() == second.snapshot().weights_hash()


def test_a_folder_without_a_state_is_refused_and_changes_nothing(make, tmp_path):
    trainer = make()
    before = trainer.snapshot().weights_hash()
    with pytest.raises(RestoreError):
        trainer.restore(tmp_path / "nothing")
    assert trainer.snapshot().weights_hash() == before


REWARDS = """
def anything(completions, **_):
    return [sum(completion[-1]["content"].encode()) % 7 for completion in completions]
"""


@pytest.fixture
def run_config(tiny_folder, tmp_path, monkeypatch):
    """`run_config("key.sub=value", ...)`: an inline run, whose backend lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(__file__, "mine.py")
    Path("rewards.py").write_text(REWARDS)
    tree = {
        "run": {"dir": str(tmp_path / "run"), "steps": 3, "mode": "inline"},
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(tiny_folder / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_new_tokens": 24, "slots": 16},
        "trainer": {"backend": "mine.py:SPEC", "settings": {"step_size": 0.5}, "batch_groups": 4},
        "reward": {"functions": [{"function": "rewards.py:anything"}]},
        "checkpoint": {"every_steps": 1},
    }
    Path("config.yaml").write_text(json.dumps(tree))
    return lambda *overrides: load("config.yaml", overrides)


@pytest.mark.slow
def test_a_whole_run_by_a_backend_of_the_users_own(run_config, tmp_path, monkeypatch):
    run_dir = asyncrl.run(run_config(), progress=False).run_dir
    assert load(run_dir / "config.yaml").trainer.backend == f"{tmp_path / 'mine.py'}:SPEC"
    assert len({c.state().weights_hash for c in Checkpoints(run_dir / "checkpoints").all()}) == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    asyncrl.resume(run_dir, ["run.steps=4"], progress=False)
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trainer.backend=deepsped", "`trainer.backend` is 'deepsped'; did you mean `deepspeed`. There are"),
        ("trainer.backend=mine.py:SPECS", r"has no `SPECS`; did you mean `SPEC`"),
        ("trainer.backend=mine.py:NOT_A_SPEC", r"is of type ModelMetaclass; give an object of a class that"),
        (
            "rollout.engine=mine.py:SPEC",
            r"is a spec for trainer/backends; give one for rollout",
        ),
        ("trainer.backend=none.py:SPEC", "there is no file .*none.py"),
        ("trainer.settings={step_sise: 1.0}", "unknown key `step_sise`; did you mean `step_size`"),
        ("trainer.settings={step_size: much}", "trainer.settings: `step_size` is the text 'much'; it should"),
        ("trainer.mini_batches=2", "trainer.mini_batches: one update a step"),
        ("trainer.ranks=2", r"mine.py:SPEC has one rank; use trainer.backend=deepspeed, or trainer.ranks=1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(run_config, override, problem):
    with pytest.raises(asyncrl.ConfigError, match=problem):
        run_config(override)


def test_settings_without_a_backend_of_ones_own_are_refused(run_config):
    with pytest.raises(asyncrl.ConfigError, match=r"trainer.settings: unknown key `step_size`"):
        run_config("trainer.backend=torch")
