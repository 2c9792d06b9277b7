"""Agents by their own clients, before vLLM: what is recorded of their sessions is what the engine sampled, to
the bit. Before the embedded engine: `tests/rollout/gateway`."""

import asyncio
import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from engine_reference import bits, turns
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.core.records import FinishReason
from asyncrl.rollout.chat import TemplateChat
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.program import Model, Task
from asyncrl.rollout.gateway.server import Gateway
from asyncrl.rollout.task import RolloutTask
from asyncrl.rollout.transcript import Completion

CONTEXT = 128
PRINTABLE = [chr(code) for code in range(32, 127)]
PAD, END = "<|pad|>", "<|im_end|>"
TEMPLATE = """\
{%- for m in messages -%}{{- m['role'][0] + ':' + m['content'] + '<|im_end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'a:' -}}{%- endif -%}"""
HELLO = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LETTERS = {"taskset": {"id": "letters"}, "agent": {"runtime": {"type": "subprocess"}}}


@pytest.fixture(scope="module")
def tokenizer():
    """A character a token: 97 in all, as many as the suite's models know."""
    vocab = {character: i for i, character in enumerate(PRINTABLE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=TEMPLATE
    )


async def of_openai(base_url, api_key, given_up):
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        ask, how = client.chat.completions.create, {"model": "any", "max_tokens": 9}
        tools = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
        await given_up(ask(messages=[HELLO], **how))
        await asyncio.gather(ask(messages=[HELLO], **how), ask(messages=[HELLO], **how))
        said = ""
        async for chunk in await ask(messages=[HELLO], tools=tools, stream=True, **how):
            said += chunk.choices[0].delta.content or ""
        answer = {"role": "assistant", "content": said}
        await ask(messages=[HELLO, answer, HELLO], tools=tools, **how)


async def of_anthropic(base_url, api_key, given_up):
    anthropic = pytest.importorskip("anthropic")
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key=api_key, max_retries=0) as client:
        ask, how = client.messages.create, {"model": "any", "max_tokens": 9}
        tools = [{"name": "add", "input_schema": SCHEMA}]
        await given_up(ask(messages=[HELLO], **how))
        await asyncio.gather(ask(messages=[HELLO], **how), ask(messages=[HELLO], **how))
        async with client.messages.stream(messages=[HELLO], tools=tools, **how) as stream:
            reply = await stream.get_final_message()
        answer = {"role": "assistant", "content": reply.content}
        await ask(messages=[HELLO, answer, HELLO], tools=tools, **how)


async def of_verifiers(base_url, api_key, given_up):
    adapter = pytest.importorskip("asyncrl.rollout.adapters.verifiers", exc_type=ImportError)
    columns = json.loads(json.dumps(next(adapter.rows(LETTERS, 1))))
    task = Task(columns.pop("prompt"), [1], columns, 0, 0, 0, 0, "train")
    assert await adapter.episode(task, Model(None, base_url, api_key)) >= 0.5


AGENTS = {of_openai: (5, 2), of_anthropic: (5, 2), of_verifiers: (2, 2)}
"""Requests that each makes, and the most of them that are one trajectory."""


class Watched:
    """Of an engine, all that it hands out."""

    def __init__(self, engine):
        self.chunks = []
        self._generate, engine.generate = engine.generate, self.generate

    async def generate(self, request):
        chunks = []
        async for chunk in self._generate(request):
            chunks.append(chunk)
            yield chunk
        self.chunks.append(Completion.of(chunks))


async def played(harness, engine, tokenizer, agent):
    """The session of an agent, and what the engine has sampled for it."""
    end = tokenizer.eos_token_id
    watched, (requests, _) = Watched(engine), AGENTS[agent]
    session = Conversation(
        RolloutTask(0, 0, 0, 0, "say", [5], {}, 1, SamplingParams(16)),
        *(0, engine),
        seed=3,
        context_tokens=CONTEXT,
        chat=TemplateChat(tokenizer, [end]),
    )
    gateway = Gateway(
        *("tiny", tokenizer, lambda ids: tokenizer.decode([i for i in ids if i != end])),
        context_tokens=CONTEXT,
        stop_ids=frozenset([end]),
    )

    async def given_up(asking):
        """Asked, and left alone in the middle: nothing decodes yet."""
        asking = asyncio.ensure_future(asking)
        while not engine.stats().waiting + engine.stats().running:
            await asyncio.sleep(0.001)
        asking.cancel()
        while session.open_requests:
            await asyncio.sleep(0.001)

    await gateway.start()
    try:
        with gateway.serving(session):
            playing = asyncio.create_task(agent(*session.door, given_up))
            while not playing.done():
                if session.open_requests and session.turns > (requests > 2):
                    await harness.progress(engine, sys.maxsize)
                await asyncio.sleep(0.001)
            await playing
    finally:
        await gateway.close()
    assert session.turns == requests
    return session, watched.chunks


@pytest.mark.parametrize("harness", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
@pytest.mark.parametrize("agent", AGENTS)
def test_what_is_recorded_is_what_was_sampled(run, harness, make_model, tokenizer, agent, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "rollout" / "gateway")
    engine = harness.make(make_model(), stop_token_ids=(tokenizer.eos_token_id,))
    session, sampled = run(played(harness, engine, tokenizer, agent))
    whole = [c for c in sampled if c.finish_reason is not FinishReason.ABORT]
    requests, in_one = AGENTS[agent]
    assert len(whole) == requests - (requests > 2)
    recorded = [[bits(*turn) for turn in turns(t)] for t in session.trajectories()]
    assert Counter(chain(*recorded)) == Counter(bits(c.token_ids, c.logprobs) for c in whole)
    assert max(map(len, recorded)) == in_one
