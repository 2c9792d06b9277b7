"""The run's own engine as a judge: what it answers with, and where it is found."""

import asyncio
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("aiohttp")

import aiohttp

from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import AsyncRLError
from asyncrl.reward_models.initial import (
    KEY_ENV,
    judge_config,
    start_initial,
    while_it_stays,
    with_initial_judges,
)
from asyncrl.rollout.chat import make_chat
from asyncrl.rollout.engines.spec import READS_WEIGHTS
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire.keys import Endpoint

JUDGE = "reward.judges=[{model: initial, body: {max_tokens: 16}}]"
QUESTION = {"role": "user", "content": "How good is this?"}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    for name in (READS_WEIGHTS, KEY_ENV, "NO_PROXY"):
        monkeypatch.setenv(name, "")  # what is set meanwhile is not for other tests
    monkeypatch.delenv(READS_WEIGHTS)
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.make_keys()
    return run_dir


def test_it_answers_with_the_models_own_weights(make_config, run_dir, one_thread):
    config = make_config("reward.functions=[]", JUDGE)

    async def main():
        gateway = await start_initial(config, run_dir, "judge-0", 20)
        driving = asyncio.create_task(gateway.engine.run())
        judge = (await with_initial_judges(config, run_dir)).reward.judges[0]
        body = {"model": judge.model, "messages": [QUESTION], "temperature": 0, "logprobs": True}
        headers = {"Authorization": f"Bearer {os.environ[judge.api_key_env]}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{judge.url}/chat/completions", json=body) as said,
        ):
            answer = await said.json()
        await gateway.close()
        await gateway.engine.close()
        await asyncio.gather(driving, return_exceptions=True)
        return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]

    found = asyncio.run(main())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(config.model.path), load_tokenizer(config.model)
    ids = make_chat(config).render([QUESTION], None)
    expected = []  # any weights say the last token again, each as surely as they do
    with torch.inference_mode():
        while len(expected) < 16 and ids[-1] != tokenizer.eos_token_id:
            likeliest = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids.append(int(likeliest.indices))
            expected.append(float(likeliest.values))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_worker_whose_judge_has_moved_begins_anew(make_config, run_dir, monkeypatch):
    monkeypatch.setattr("asyncrl.reward_models.initial.POLL_S", 0.01)
    config = make_config("reward.functions=[]", JUDGE)

    def listens(host):
        run_dir.announce_endpoint("judge-0", Endpoint.of(f"http://{host}:4711", run_dir.keys()))

    async def main():
        listens("10.0.0.7")
        staying = asyncio.create_task(while_it_stays(await with_initial_judges(config, run_dir), run_dir))
        await asyncio.wait([staying], timeout=0.1)
        assert not staying.done()
        listens("10.0.0.8")
        with pytest.raises(AsyncRLError, match=r"judge-0 listens at http://10\.0\.0\.8:4711 now, and not at"):
            await asyncio.wait_for(staying, 30)

    asyncio.run(main())


def test_those_on_other_hosts_find_it_and_its_successor_listens_where_it_did(run_dir):
    endpoint = Endpoint.of("http://10.0.0.7:4711", run_dir.keys())
    run_dir.announce_endpoint("judge-0", endpoint)
    name = ".judge-0"
    assert name in run_dir.meeting_points()
    assert name in run_dir.files_to_send("judge-0") and name not in run_dir.files_to_send("rollout-0")


def test_its_context_holds_what_evaluation_shows_it(make_config):
    judge = "reward.judges=[{model: initial, asks: group}]"
    held_out = "data.held_out_rows=4", "evaluation={every_steps: 2, samples: 9}"
    (_, alone), (_, beside) = (
        judge_config(make_config("reward.functions=[]", judge, *own), 20) for own in ((), held_out)
    )
    config = make_config()
    assert beside - alone == (9 - config.rollout.group_size) * config.rollout.max_new_tokens
