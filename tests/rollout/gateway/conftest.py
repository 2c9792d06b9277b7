"""A gateway in front of the embedded engine, whose model has learnt by heart to call a tool and to answer."""

import asyncio
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine_reference import bits, turns

from asyncrl.reward.text import ResponseText
from asyncrl.rollout.chat import TemplateChat
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.gateway.server import Gateway
from asyncrl.rollout.task import RolloutTask
from asyncrl.rollout.transcript import Completion
from asyncrl.tiny.tokenizer import byte_tokenizer

CONTEXT, LONGEST = 400, 80
TEMPLATE = """\
{%- if tools -%}{{- '<|im_start|>system\\n' + tools[0].function.name + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
{%- for call in message.tool_calls or () -%}
{%- set said = {'name': call.function.name, 'arguments': call.function.arguments} -%}
{{- '<tool_call>' + said | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds one.", "parameters": SCHEMA}}
QUESTION = {"role": "user", "content": "4+1?"}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 4}}</tool_call>'
ANSWER = "It is 5."


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = byte_tokenizer(CONTEXT)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


MODELS = {}
"""Made once for all tests: learning takes seconds."""


@pytest.fixture
def make_model(make_qwen3, tokenizer):
    """Of a kind: `wild`, whose distributions are far from certain, or `taught`, which knows `CALL` and
    `ANSWER` by heart."""

    def make(kind):
        if kind not in MODELS:
            MODELS[kind] = make_qwen3(vocab_size=len(tokenizer))
            MODELS[kind].generation_config.eos_token_id = tokenizer.eos_token_id
            MODELS[kind].config.eos_token_id = tokenizer.eos_token_id
            if kind == "taught":
                _learn(MODELS[kind], tokenizer)
        return MODELS[kind]

    return make


def _learn(model, tokenizer):
    say = TemplateChat(tokenizer, [tokenizer.eos_token_id])
    asked = say.render([QUESTION], [TOOL]), [*say.encode(CALL), tokenizer.eos_token_id]
    called = [*asked[0], *asked[1], *say.encode("\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n")]
    answered = called, [*say.encode(ANSWER), tokenizer.eos_token_id]
    ids = torch.tensor([called + answered[1]])
    wanted = torch.full_like(ids, -100)
    for prompt, reply in (asked, answered):
        wanted[0, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    with torch.no_grad():  # a beginning from which it learns fast
        for weight in model.parameters():
            weight.mul_(0.1 if weight.dim() > 1 else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(1000):
        loss = F.cross_entropy(model(ids).logits[0, :-1], wanted[0, 1:])
        if loss < 1e-3:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"it has not learnt its lines: {loss.item()}")


@pytest.fixture
def lesson():
    return SimpleNamespace(tool=TOOL, question=QUESTION, call=CALL, answer=ANSWER)


@dataclass
class Served:
    engine: TorchEngine
    gateway: Gateway
    session: Conversation
    sampled: list = field(default_factory=list)
    """All that the engine has handed out: requests with their chunks."""

    async def until(self, condition):
        """What the test waits for comes by itself; pytest's timeout bounds it."""
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def serve(make_model, tokenizer, one_thread):
    """`async with serve(...) as served`: a session of one that has the gateway's door open."""

    @asynccontextmanager
    async def serve(kind="wild", *, temperature=1.0, drive=True, listens=None, **sampling):
        end = tokenizer.eos_token_id
        engine = TorchEngine(make_model(kind), capacity=4, max_length=CONTEXT, stop_token_ids=(end,))
        params = SamplingParams(LONGEST, temperature, **sampling)
        task = RolloutTask(0, 0, 0, 0, "say", [5, 6, 7], {}, 1, params)
        chat = TemplateChat(tokenizer, [end], context_tokens=CONTEXT)
        session = Conversation(task, 0, engine, seed=3, context_tokens=CONTEXT, chat=chat)
        text_of = ResponseText(tokenizer, {end})
        ends = frozenset([end])
        how = {"context_tokens": CONTEXT, "stop_ids": ends} | (listens or {})
        gateway = Gateway("tiny", tokenizer, text_of, **how)
        served = Served(engine, gateway, session)
        _watch(engine, served.sampled)
        driving = asyncio.create_task(engine.run()) if drive else None
        await gateway.start()
        try:
            with gateway.serving(session):
                yield served
        finally:
            await gateway.close()
            await engine.close()
            if driving is not None:
                await asyncio.gather(driving, return_exceptions=True)

    return serve


def _watch(engine, sampled):
    generate = engine.generate
    engine.generate = lambda request: _noted(request, generate(request), sampled)


async def _noted(request, chunks, sampled):
    async for chunk in chunks:
        sampled.append((request, chunk))
        yield chunk


@dataclass
class Recorded:
    """What the engine of a run in this process has sampled, and what its sessions have recorded of it."""

    sampled: list = field(default_factory=list)
    sessions: list = field(default_factory=list)

    def assert_as_sampled(self, *, given_up=0):
        """Ids and logprobs of all turns that are trained on are the engine's, to the bit. given_up: of each
        session's requests, those that nobody waited for at most."""
        chunks = defaultdict(list)
        for request, chunk in self.sampled:
            chunks[request.request_id].append(chunk)
        whole = {name: Completion.of(some) for name, some in chunks.items() if some[-1].finish_reason}
        for session in self.sessions:
            name = f"{session.task.lease_id}/{session.index}"
            names = [name, *(f"{name}/{number}" for number in range(1, session.turns))]
            sampled = Counter(bits(whole[n].token_ids, whole[n].logprobs) for n in names if n in whole)
            trained = Counter(bits(*turn) for t in session.trajectories() for turn in turns(t))
            assert trained <= sampled
            assert session.turns - given_up <= trained.total() <= session.turns


@pytest.fixture
def recorded(monkeypatch):
    """Of the `inline` runs of a test."""
    recorded, generate = Recorded(), TorchEngine.generate

    def session(*args, **named):
        recorded.sessions.append(Conversation(*args, **named))
        return recorded.sessions[-1]

    def watched(engine, request):
        return _noted(request, generate(engine, request), recorded.sampled)

    monkeypatch.setattr(TorchEngine, "generate", watched)
    monkeypatch.setattr("asyncrl.rollout.episodes.make.Conversation", session)
    return recorded
