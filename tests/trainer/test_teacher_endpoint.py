"""A teacher behind an endpoint says what the same teacher says here."""

import pytest
import torch
from batches import make_batch, with_true_logprobs

pytest.importorskip("aiohttp")

import teacher_server

from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import ConfigError, NotHereError, RunFailed
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.lessons.endpoint import check


@pytest.fixture(autouse=True)
def _without_a_proxy_or_long_pauses(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("asyncrl.trainer.lessons.endpoint.FIRST_PAUSE_S", 0.05)


@pytest.fixture
def paths(make_qwen3, save_model):
    return save_model(make_qwen3()), save_model(make_qwen3(seed=1), "teacher")


@pytest.fixture
def config_of(make_config, paths):
    def config_of(**teacher):
        trainer = {"lr": 3e-3, "eps": 1e-4, "micro_batch_tokens": 64}
        return make_config(paths[0], run={"steps": 10}, teacher=teacher, trainer=trainer)

    return config_of


@pytest.fixture
def batch(make_qwen3):
    return with_true_logprobs(make_batch(0), make_qwen3(), noise=0.0)


def weights(trainer):
    return torch.cat([t.detach().flatten() for t in trainer.weights().values()])


def test_it_teaches_what_the_same_model_teaches_here(config_of, paths, batch, monkeypatch):
    """Though the server is busy now and then."""
    here = make_trainer(config_of(path=str(paths[1])))
    told = here.step(batch)
    monkeypatch.setenv("KEY_OF_TEACHER", "a secret")
    busy = {0: (503, "starting"), 5: (429, "too many")}
    with teacher_server.serving(paths[1], fails=busy.get) as server:
        served = make_trainer(config_of(endpoint=server.url, api_key_env="KEY_OF_TEACHER", concurrency=3))
        assert served.step(batch)["teacher/kl"] == pytest.approx(told["teacher/kl"], rel=1e-5)
    torch.testing.assert_close(weights(served), weights(here), rtol=1e-5, atol=1e-6)
    assert len(server.scored) == 16
    assert set(server.keys) == {"Bearer a secret"}


def test_one_that_is_away_is_waited_for_and_then_named(config_of, paths, batch):
    with teacher_server.serving(paths[1]) as server:
        pass
    config = config_of(endpoint=server.url, patience_s=0.2)
    with pytest.raises(
        RunFailed, match=rf"teacher\.endpoint={server.url} has been away for .*patience_s=0\.2"
    ):
        make_trainer(config).step(batch)
    with pytest.raises(NotHereError, match=f"teacher.endpoint={server.url}: no teacher answers there"):
        check(config.teacher, load_tokenizer(config.model))


def test_one_that_refuses_is_not_asked_again(config_of, paths, batch):
    with teacher_server.serving(paths[1], fails=lambda count: (404, "no such model")) as server:
        trainer = make_trainer(config_of(endpoint=server.url, concurrency=1))
        with pytest.raises(RunFailed, match=r"answers with status 404: .*no such model"):
            trainer.step(batch)
    assert len(server.keys) == 2, "which model it has, and the one question"


def test_its_tokens_must_be_the_policys_and_its_context_long_enough(config_of, paths, tiny_folder):
    with teacher_server.serving(paths[1]) as server:
        config = config_of(endpoint=server.url)
        check(config.teacher, load_tokenizer(config.model), 10**6)
    with teacher_server.serving(paths[1], max_model_len=64) as server:
        config = config_of(endpoint=server.url)
        check(config.teacher, load_tokenizer(config.model), 63)
        with pytest.raises(ConfigError, match=r"reads 63 tokens at most .* --max-model-len 65"):
            check(config.teacher, load_tokenizer(config.model), 64)
    with teacher_server.serving(tiny_folder) as server:
        config = config_of(endpoint=server.url)
        with pytest.raises(ConfigError, match=r"its tokenizer is another: a text of"):
            check(config.teacher, load_tokenizer(config.model))
