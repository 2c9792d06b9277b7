"""A gateway to an engine of which nothing is trained on, as the run's own judge has it."""

import asyncio

import aiohttp
import torch

from asyncrl.reward.text import ResponseText
from asyncrl.rollout.chat import TemplateChat
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.gateway.open import OpenGateway

CONTEXT, TOKENS = 400, 12


def test_each_request_is_sampled_as_it_asks_by_weights_that_stay(make_model, tokenizer, one_thread):
    model, end = make_model("wild"), tokenizer.eos_token_id
    chat = TemplateChat(tokenizer, [end])
    message = {"role": "user", "content": "4+1?"}

    async def main():
        engine = TorchEngine(model, capacity=4, max_length=CONTEXT, stop_token_ids=(end,))
        gateway = OpenGateway(
            *(engine, chat, "sk-right", SamplingParams(TOKENS)),
            seed=3,
            model="tiny",
            tokenizer=tokenizer,
            text_of=ResponseText(tokenizer, {end}),
            context_tokens=CONTEXT,
            stop_ids=frozenset([end]),
        )
        driving = asyncio.create_task(engine.run())
        await gateway.start()

        async def ask(key="sk-right", **body):
            body = {"model": "initial", "messages": [message], **body}
            headers = {"Authorization": f"Bearer {key}"}
            async with session.post(
                f"{gateway.base_url}/chat/completions", json=body, headers=headers
            ) as said:
                return said.status, await said.json()

        async with aiohttp.ClientSession() as session:
            greedy = await asyncio.gather(*(ask(temperature=0) for _ in range(3)))
            sampled = await asyncio.gather(*(ask(temperature=1) for _ in range(3)))
            short, refused = await ask(temperature=0, max_tokens=2), await ask("sk-wrong")
            off = await ask(temperature=0, top_k=-1)
            long = [{"role": "user", "content": "4+1?" * CONTEXT}]
            asked = [{"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"messages": long}]
            asked += [{"structured_outputs": {"regex": "[0-9]"}}]
            wrong = await asyncio.gather(*(ask(**body) for body in asked))
        await gateway.close()
        await engine.close()
        await asyncio.gather(driving, return_exceptions=True)
        return greedy, sampled, short, refused, off, wrong

    greedy, sampled, short, refused, off, wrong = asyncio.run(main())
    ids = chat.render([message], None)
    prompt = len(ids)
    with torch.inference_mode():
        while len(ids) - prompt < TOKENS and ids[-1:] != [end]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ResponseText(tokenizer, {end})(ids[prompt:])

    def texts(answers):
        return [answer["choices"][0]["message"]["content"] for _, answer in answers]

    assert texts([*greedy, off]) == [expected] * 4
    assert len(set(texts(sampled))) > 1, "each has a seed of its own"
    assert short[1]["usage"]["completion_tokens"] == 2
    assert refused[0] == 401
    assert [status for status, _ in wrong] == [400] * 5
    params = [answer["error"]["param"] for _, answer in wrong]
    assert params == ["temperature", "top_p", "top_k", "messages", "structured_outputs"]
    assert f"the context holds no more than {CONTEXT}" in wrong[3][1]["error"]["message"]
