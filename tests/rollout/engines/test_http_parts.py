"""The parts of the HTTP engine that need no server."""

import asyncio

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.errors import RunFailed
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import ServerError
from asyncrl.rollout.engines.http.facts import Info, Needs, room, unfit
from asyncrl.rollout.engines.http.job import Job
from asyncrl.rollout.engines.http.router import Router
from asyncrl.rollout.engines.http.server import Owner, Server, ServerSettings
from asyncrl.rollout.engines.http.weights_dir import WeightsDir, sweep
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.weights.source import WeightsError, untied


def spread(router, prompts, servers):
    """How many requests each server gets when none ends."""
    loads = dict.fromkeys(servers, 0)
    for prompt in prompts:
        loads[router.choose(prompt, loads)] += 1
    return loads


@pytest.mark.parametrize("system", [b"", bytes(4 * 40)], ids=["bare", "after a system prompt"])
def test_a_group_stays_together_and_groups_spread(system):
    router = Router(slack=4)
    homes = []
    loads = dict.fromkeys("abc", 0)
    for group in range(6):
        chosen = []
        for _ in range(4):
            chosen.append(router.choose(system + b"%d" % group * 100, loads))
            loads[chosen[-1]] += 1
        assert len(set(chosen)) == 1
        homes.append(chosen[0])
    assert sorted(homes) == ["a", "a", "b", "b", "c", "c"]


def test_equal_prompts_do_not_pile_up():
    assert spread(Router(slack=4), [b"same"] * 30, "ab") == {"a": 15, "b": 15}


def test_a_prompt_whose_server_is_gone_finds_another_and_stays_there():
    router = Router(slack=4)
    assert router.choose(b"p", {"a": 0, "b": 0}) == "a"
    assert router.choose(b"p", {"b": 3, "c": 2}) == "c"
    assert router.choose(b"p", {"a": 0, "b": 3, "c": 3}) == "c"


def test_turns_of_an_episode_go_where_the_earlier_ones_are_unless_too_many_do():
    router, loads = Router(slack=4), {"a": 3, "b": 2, "c": 4}
    first = np.arange(40, dtype=np.int32)
    assert router.choose(first.tobytes(), loads) == "b"
    second = np.arange(90, dtype=np.int32)
    assert router.choose(second.tobytes(), {"a": 0, "b": 4, "c": 0}) == "b"
    assert router.choose(np.arange(1, 90, dtype=np.int32).tobytes(), {"a": 0, "b": 4, "c": 0}) == "a"
    assert router.choose(np.arange(120, dtype=np.int32).tobytes(), {"a": 1, "b": 5, "c": 0}) == "c"
    assert router.choose(np.arange(150, dtype=np.int32).tobytes(), {"a": 1, "b": 1, "c": 4}) == "c"


@given(
    st.lists(st.integers(0, 5).map(lambda i: b"%d" % i), max_size=60),
    st.integers(1, 4),
    st.integers(1, 8),
)
def test_no_server_gets_much_more_than_another(prompts, servers, slack):
    loads = spread(Router(slack), prompts, [str(i) for i in range(servers)])
    assert max(loads.values()) - min(loads.values()) <= slack + 1


def event(tokens, logprobs=None, finish=None, spans=None):
    """A choice as the server sends it."""
    content = [
        {"token_id": t, "logprob": p} for t, p in zip(tokens, logprobs or [-1.0] * len(tokens), strict=True)
    ]
    data = {
        "token_ids": tokens,
        "logprobs": {"content": content},
        "finish_reason": finish,
        "weight_versions": spans,
    }
    return msgspec.json.decode(msgspec.json.encode({"choices": [data]}), type=wire.Event).choices[0]


def test_an_output_comes_together():
    me = wire.Identity()
    output = wire.Output()
    assert output.add(event([5, 6], [-0.5, -0.25])) == 2
    spans = [{"version": me.label(3), "start": 0, "end": 2}, {"version": me.label(4), "start": 2, "end": 3}]
    assert output.add(event([7], [-2.0], "stop", spans)) == 1
    assert output.add(wire.Choice(reused=2)) == 0
    chunk = output.chunk(me)
    assert chunk.token_ids.tolist() == [5, 6, 7]
    assert chunk.logprobs.tolist() == [-0.5, -0.25, -2.0]
    assert chunk.versions == (VersionSpan(0, 2, 3), VersionSpan(2, 1, 4))
    assert chunk.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("label", "start", "end", "finish", "says"),
    [
        ("default", 0, 2, "stop", "'default'.*not those of this run"),
        ("{other}:1", 0, 2, "stop", "not those of this run"),
        ("{me}:1", 0, 1, "stop", "1 of 2 tokens"),
        ("{me}:1", 1, 2, "stop", "stamps token versions"),
        ("{me}:1", 0, 2, None, "broke off"),
        ("{me}:1", 0, 2, "error", "'error'"),
    ],
)
def test_an_output_that_cannot_be_trusted_is_refused(label, start, end, finish, says):
    me = wire.Identity()
    label = label.format(me=me.name, other=wire.Identity().name)
    output = wire.Output()
    output.add(event([5, 6], finish=finish, spans=[{"version": label, "start": start, "end": end}]))
    with pytest.raises(wire.WireError, match=says):
        output.chunk(me)


def test_a_logprob_that_is_not_finite_or_missing_is_refused():
    with pytest.raises(wire.WireError, match="not finite"):
        wire.Output().add(event([5], [-9999.0]))
    with pytest.raises(wire.WireError, match="0 log-probabilities for 1 tokens"):
        wire.Output().add(wire.Choice(token_ids=[5]))


def test_a_request_says_all_that_the_server_would_else_fill_in():
    request = GenerationRequest("r", np.array([3, 4], np.int32), SamplingParams(7, 0.5, 0.9, 11, (), 5))
    body = wire.generate_body(request, "x", [1], "salt", 16)
    assert body["token_ids"] == [3, 4]
    assert body["cache_salt"] == "salt"
    assert body["sampling_params"] == {
        "max_tokens": 7, "min_tokens": 0, "temperature": 0.5, "top_p": 0.9, "top_k": 11, "seed": 5,
        "stop_token_ids": [1], "ignore_eos": True, "logprobs": 0, "detokenize": False, "stream_interval": 16,
    }  # fmt: skip


def info(**changed):
    values = {
        "logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": 128,
        "load_format": "auto", "enable_chunked_prefill": True, "device": "cuda", "max_num_seqs": 64,
    } | changed  # fmt: skip
    config = {
        "model_config": {"model": "m", **{k: values[k] for k in ("dtype", "logprobs_mode", "max_model_len")}},
        "scheduler_config": {k: values[k] for k in ("max_num_seqs", "enable_chunked_prefill")},
        "load_config": {"load_format": values["load_format"]},
        "device_config": {"device": values["device"]},
    }
    return msgspec.convert({"vllm_config": config}, type=Info)


@pytest.mark.parametrize(
    ("version", "changed", "remedy"),
    [
        ("0.31.2", {}, "0.32 <= version < 0.33"),
        ("0.32.0", {"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ("0.32.0", {"dtype": "torch.bfloat16"}, "--dtype float32"),
        ("0.32.0", {"max_model_len": 99}, "--max-model-len 100"),
        ("0.32.0", {"load_format": "dummy"}, "--load-format dummy"),
        ("0.32.0", {"device": "cpu"}, "--no-enable-chunked-prefill"),
    ],
)
def test_a_server_with_other_options_is_told_which(version, changed, remedy):
    (problem,) = unfit(version, info(**changed), Needs("float32", 100, experts=False))
    assert remedy in problem


def test_a_server_on_the_cpu_takes_no_mixture_of_experts():
    on_cpu = info(device="cpu", enable_chunked_prefill=False)
    (problem,) = unfit("0.32.0", on_cpu, Needs("float32", 100, experts=True))
    assert "once only" in problem
    assert list(unfit("0.32.0", info(), Needs("float32", 100, experts=True))) == []
    assert list(unfit("0.32.0", on_cpu, Needs("float32", 100, experts=False))) == []


def test_a_server_with_the_right_options_is_fit_and_keeps_a_place_free():
    assert list(unfit("0.32.1+cpu", info(), Needs("float32", 100, experts=False))) == []
    assert room(info()) == 63


@pytest.mark.parametrize(
    ("status", "becomes"), [(400, "refused"), (404, "refused"), (408, "lost"), (429, "lost"), (503, "lost")]
)
def test_a_refusal_that_may_pass_costs_a_request_its_server_and_no_more(status, becomes):
    class Refusing:
        url = "http://server"

        async def generate(self, body):
            raise ServerError(f"status {status}", status)
            yield  # a generator, like the real one

    class Recorder(Owner):
        heard = ()

        def lost(self, jobs, *, failed):
            self.heard += (("lost", failed, len(jobs)),)

        def refused(self, error):
            self.heard += (("refused", error.status),)

    async def ask():
        settings = ServerSettings(wire.Identity(), Needs("float32", 100, experts=False), "keep", 8, 10.0)
        server = Server(Refusing(), settings, owner := Recorder())
        server._version = 0
        job = Job(GenerationRequest("r", np.arange(3, dtype=np.int32), SamplingParams(7)), [], 0)
        server.start(job)
        await job.task
        return owner.heard

    heard = asyncio.run(asyncio.wait_for(ask(), 10))
    assert heard == ((("lost", True, 1),) if becomes == "lost" else (("refused", status),))


def test_weights_are_written_whole_with_tied_names_and_go_again(tmp_path, make_qwen3):
    model = make_qwen3(tie=True)
    model.config.save_pretrained(tmp_path)
    folder = WeightsDir(tmp_path / "weights")
    tensors = ExpectedWeights(str(tmp_path), "float32").as_files(untied(model.state_dict()))
    written = folder.write(3, tensors)
    read = load_file(written / "model.safetensors")
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    assert (written / "model.safetensors").stat().st_mode & 0o777 == 0o644
    folder.drop(written)
    assert not written.exists()
    left = folder.write(4, tensors)
    folder.close()
    assert not left.exists()


def test_a_weights_dir_is_held_and_what_a_killed_worker_left_goes(tmp_path):
    path = tmp_path / "weights"
    left = path / "asyncrl-v7-0123abcd"
    left.mkdir(parents=True)
    first = WeightsDir(path)
    assert not left.exists()
    with pytest.raises(RunFailed, match=r"weights_dir=.*another run is using this folder"):
        WeightsDir(path)
    first.close()
    WeightsDir(path).close()


def test_a_launcher_sweeps_after_its_run_and_not_what_another_run_has_there(tmp_path):
    path = tmp_path / "weights"
    sweep(path)
    assert not path.exists()
    held = WeightsDir(path)
    theirs = held.write(1, {"w": torch.zeros(2)})
    sweep(path)
    assert theirs.exists()
    held.close()
    left = path / "asyncrl-v7-0123abcd"
    left.mkdir()
    (path / "notes.txt").touch()
    sweep(path)
    assert not left.exists()
    assert (path / "notes.txt").exists()


def test_weights_that_cannot_be_written_are_an_error_of_the_version(tmp_path):
    folder = WeightsDir(tmp_path / "weights")
    (tmp_path / "weights").rename(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"version 3 cannot be written into rollout\.http\.weights_dir="):
        folder.write(3, {"w": torch.zeros(2)})
    folder.close()
