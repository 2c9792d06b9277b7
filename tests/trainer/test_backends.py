import subprocess
import sys
import time

import pytest
import torch
import yaml

from asyncrl.data.tokenizer import TokenizerError
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.learner import trained_parameters
from asyncrl.trainer.models.policy import Policy, published
from asyncrl.trainer.packing.batch import BatchError


@pytest.fixture
def trainer(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())
    return make_trainer(make_config(path, trainer={"lr": 1e-2}))


def test_weights_are_the_live_tensors_with_tied_ones_once_under_their_first_name(trainer, random_batch):
    weights = trainer.weights()
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    assert not any(tensor.requires_grad for tensor in weights.values())
    before = {name: tensor.clone() for name, tensor in weights.items()}
    trainer.step(random_batch(0))
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, before[name])]
    assert set(changed) == set(weights)


def test_an_untied_head_is_published(make_qwen3, save_model, make_config):
    trainer = make_trainer(make_config(save_model(make_qwen3(tie=False))))
    assert "lm_head.weight" in trainer.weights()


def test_a_model_without_a_tokenizer_is_refused_when_it_is_loaded(make_qwen3, tmp_path, make_config):
    make_qwen3().save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer could be loaded"):
        make_trainer(make_config(tmp_path))


def test_a_batch_that_cannot_be_trained_on_leaves_the_trainer_usable(trainer, random_batch):
    broken = random_batch(0)
    broken.groups[1].trajectories[2].reward = float("nan")
    with pytest.raises(BatchError, match="group 13, trajectory 2"):
        trainer.step(broken)
    assert trainer.step(random_batch(1))["trained_tokens"] > 0


def test_a_paced_trainer_takes_its_time_counts_its_batch_and_makes_new_weights(make_config, random_batch):
    trainer = make_trainer(
        make_config(rollout={"engine": "paced"}, trainer={"backend": "paced", "paced": {"step_s": 0.2}})
    )
    before = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    start = time.monotonic()
    metrics = trainer.step(random_batch(0, oldest_version=1))
    assert time.monotonic() - start >= 0.2
    assert metrics["trained_tokens"] > 0
    assert metrics["masked_tokens"] > 0
    assert all(not torch.equal(trainer.weights()[name], old) for name, old in before.items())


def test_a_paced_trainer_refuses_what_a_real_one_refuses(make_config, random_batch):
    trainer = make_trainer(
        make_config(rollout={"engine": "paced"}, trainer={"backend": "paced", "paced": {"step_s": 0.0}})
    )
    broken = random_batch(0)
    broken.groups[0].trajectories[0].reward = float("inf")
    with pytest.raises(BatchError, match="the reward is inf"):
        trainer.step(broken)


@pytest.mark.slow
def test_paced_ranks_take_their_steps_together(make_config, random_batch, tmp_path):
    config = make_config(
        rollout={"engine": "paced"}, trainer={"backend": "paced", "ranks": 3, "paced": {"step_s": 0.1}}
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path; from asyncrl import config; "
        "from asyncrl.trainer.backend import backend_of; c = config.load(Path(sys.argv[1])); "
        "backend_of(c).make_rank(c, int(sys.argv[2]), Path(sys.argv[3])).follow()"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(rank), str(tmp_path / "meet")])
        for rank in (1, 2)
    ]
    try:
        trainer = make_trainer(config, tmp_path / "meet")
        for step in range(2):
            trainer.step(random_batch(step))
            assert [rank.poll() for rank in ranks] == [None, None]
        trainer.close()
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_imports_stay_light():
    code = (
        "import sys, asyncrl.trainer.backend; assert 'torch' not in sys.modules; "
        "import asyncrl.trainer.backends.paced.backend; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_published_need_not_be_what_is_trained(make_qwen3):
    model = make_qwen3()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = trained_parameters(Policy(model, temperature=1.0, chunk_tokens=16))
    assert published(model).keys() - trained.keys() == {"model.embed_tokens.weight"}
    assert trained.keys() < published(model).keys()
