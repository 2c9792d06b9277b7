"""What DeepSpeed makes of our settings, on one rank in this process."""

import pytest
import torch
from families import tiny

from asyncrl.trainer.backends.deepspeed.engine_settings import engine_settings
from asyncrl.trainer.backends.deepspeed.group import RankGroup
from asyncrl.trainer.critic.model import Critic
from asyncrl.trainer.models.checks import ModelError

pytestmark = pytest.mark.deepspeed

BUCKET_ELEMENTS = 5000


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """For all tests, since DeepSpeed keeps its own groups for as long as the process lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
        made = RankGroup(0, 1, rendezvous, torch.device("cpu"), start_timeout_s=60.0)
        yield made
        made.close()


@pytest.fixture
def make_learner(group, make_config, make_qwen3):
    from deepspeed import comm

    from asyncrl.trainer.backends.deepspeed.learner import DeepSpeedLearner

    def make(**settings):
        section = {"backend": "deepspeed", "deepspeed": settings}
        config = make_config(model={"dtype": "bfloat16"}, trainer=section)
        learner = DeepSpeedLearner(Critic(make_qwen3(dtype=torch.bfloat16)), config)
        assert comm.comm.cdb.shm_comm_op is None, "it was compiled for nothing"
        return learner

    return make


def test_an_adapters_gradients_travel_in_buckets_that_are_small_beside_the_model(make_config):
    section = {"backend": "deepspeed", "deepspeed": {"zero_stage": 3}, "lora": {"rank": 8}}
    zero = engine_settings(make_config(trainer=section))["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10**7


def test_gradients_are_summed_in_float32_in_small_buckets_beside_the_backward_pass(make_learner):
    for stage in (1, 2, 3):
        engine = make_learner(zero_stage=stage)._engine
        assert engine.get_data_types() == (torch.bfloat16, torch.float32)
        assert engine.communication_data_type == torch.float32
        assert engine.zero_reduce_bucket_size() == 10**8
        assert engine.zero_overlap_comm() == (stage > 1)
        assert engine.gradient_average == (stage == 3)
    assert make_learner(communication_dtype="bfloat16")._engine.communication_data_type == torch.bfloat16


def test_the_memory_of_a_gradient_larger_than_a_bucket_outlives_its_sum_on_the_other_stream(
    make_learner, monkeypatch
):
    held = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda grad, stream: held.append((grad.shape, stream)))
    learner = make_learner(zero_stage=2, zero={"reduce_bucket_size": BUCKET_ELEMENTS})
    stream = learner._engine.optimizer.reduction_stream = object()  # a CPU has none
    large = [p.shape for p in learner._parameters.values() if p.numel() > BUCKET_ELEMENTS]
    assert 0 < len(large) < len(learner._parameters)
    learner.backward(sum(p.float().sum() for p in learner._parameters.values()))
    assert sorted(held) == sorted((shape, stream) for shape in large)
    assert all(p.grad is None for p in learner._parameters.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_what_follows_is_as_if_no_memory_had_been_given_up(make_learner, stage):
    """On a CPU, too, values move to another place, and references to the old one would show."""
    after = []
    for offloads in (False, True):
        torch.manual_seed(0)
        learner = make_learner(zero_stage=stage)
        for step in range(3):
            whole = [p.ds_tensor if stage == 3 else p for p in learner._parameters.values()]
            if offloads and step:
                learner.offload()
                assert learner._engine.optimizer.offloaded_states
                learner.reload()
                whole = [p.ds_tensor if stage == 3 else p for p in learner._parameters.values()]
            assert all(t.numel() for t in whole)
            tokens = torch.arange(12).view(2, 6)
            loss = learner._engine.module.hidden_states(tokens).float().square().sum()
            learner.backward(loss)
            learner.update(1e-2, step)
        after.append({(kind, name): t.clone() for kind, name, t in learner.tensors()})
    assert all(torch.equal(t, after[1][key]) for key, t in after[0].items())
    assert any(key[0] == "exp_avg" and t.abs().max() > 0 for key, t in after[0].items())


def test_memory_can_be_given_up_where_nothing_is_shared_out_too(group, make_config, make_qwen3):
    from asyncrl.trainer.backends.deepspeed.backend import _learner
    from asyncrl.trainer.offload import offload, reload

    config = make_config(trainer={"backend": "deepspeed", "deepspeed": {"zero_stage": 0}})
    parts = {"policy": _learner(Critic(make_qwen3()), config, group)}
    offload(parts)
    reload(parts)


def test_buffers_are_published_too_and_all_in_the_dtypes_that_the_model_was_loaded_with(
    group, make_config, tmp_path
):
    from transformers import AutoModelForCausalLM

    from asyncrl.trainer.backends.deepspeed.learner import DeepSpeedLearner
    from asyncrl.trainer.backends.deepspeed.weights import GatheredWeights

    for family, kept in (("glm4_moe", "gate.e_score_correction_bias"), ("ernie4_5_moe", "gate.weight")):
        tiny(family).save_pretrained(tmp_path / family)
        for stage in (1, 3):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
            loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            dtypes = {name: tensor.dtype for name, tensor in loaded.items()}
            section = {"backend": "deepspeed", "deepspeed": {"zero_stage": stage}}
            DeepSpeedLearner(model, make_config(model={"dtype": "bfloat16"}, trainer=section))
            weights = GatheredWeights(model, dtypes)
            published = {name: tensor.clone() for name, tensor in weights.parts()}
            assert [entry.name for entry in weights.manifest.entries] == list(published)
            assert dtypes.items() >= {name: t.dtype for name, t in published.items()}.items()
            assert {name for name in published if name.endswith(kept) and dtypes[name] == torch.float32}
            for name, tensor in published.items():
                torch.testing.assert_close(tensor, loaded[name], rtol=4e-3, atol=0)


def test_adapters_of_a_model_in_two_dtypes_are_refused():
    from asyncrl.trainer.backends.deepspeed.backend import _refuse_mixed

    model = tiny("ernie4_5_moe")
    _refuse_mixed(model)
    model.to(torch.bfloat16)
    model.get_parameter("model.layers.1.mlp.gate.weight").data = torch.zeros(1)
    with pytest.raises(
        ModelError, match=r"gate.weight is not in torch.bfloat16; .*zero_stage=3.*zero_stage=0"
    ):
        _refuse_mixed(model)
