"""Random conversations of five families of models as they are, and by templates in the shapes of five: every
token that is trained on was sampled in exactly the context that its trajectory shows, which a forward pass
confirms, and none is lost or there twice."""

import asyncio
import json
import random
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from chat_families import FAMILIES, RENDERED, SPECIAL, TAGGED_CALL, Rendered
from tokenizers import AddedToken

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.reward.processes import wire
from asyncrl.rollout.chat import RendererChat, TemplateChat, Turn
from asyncrl.rollout.engines.base import SamplingParams, TokenChunk
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.task import RolloutTask
from asyncrl.rollout.transcript import Completion
from asyncrl.tiny.tokenizer import byte_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
    }
]
SAMPLED_TEXTS = ["yes", " two  words ", "naïve – 東京 🙂", "", '{"a": 1}', "a\n\nb", "<b>x</b>"]
QUESTIONS = ["why?", "and then\n", "¿qué?", " more "]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer(4096)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


@pytest.fixture
def model(make_qwen3, tokenizer):
    return make_qwen3(vocab_size=len(tokenizer))


def logprobs(model, ids):
    """float32[T]: of each token after the ones before it; 0 for the first."""
    with torch.inference_mode():
        logits = model(torch.as_tensor(ids).long()[None]).logits[0].log_softmax(-1)
    following = logits[:-1].gather(1, torch.as_tensor(ids)[1:, None].long())[:, 0]
    return np.concatenate([[0], following.numpy()]).astype(np.float32)


class Ventriloquist:
    """An engine whose policy says what it is told to, with the log-probabilities of the model."""

    def __init__(self, model):
        self.model, self.ids, self.says, self.step = model, [], [], 0

    async def generate(self, request):
        said = self.says.pop(0)
        is_cut = len(said) > request.sampling.max_new_tokens
        said = said[: request.sampling.max_new_tokens]
        self.step += 1
        self.ids.append(said)
        await asyncio.sleep(0)
        whole = np.concatenate([request.prompt_ids, said]).astype(np.int32)
        reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
        of_said = logprobs(self.model, whole)[len(request.prompt_ids) :]
        spans = (VersionSpan(0, len(said), self.step),)
        yield TokenChunk(np.asarray(said, np.int32), of_said, spans, reason)

    def abort(self, request_id):
        raise AssertionError("nothing is given up here")


def utterance(rng, family, tokenizer):
    """What a policy might say, as token ids: reasoning, a call, odd bytes, in its own spacing."""
    text, end = rng.choice(SAMPLED_TEXTS), family.end
    if rng.random() < 0.4:
        thought = rng.choice(["hm", "let me\nsee"])
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    if rng.random() < 0.4:
        spacing = rng.choice([(", ", ": "), (",", ":")])
        arguments = {"a": rng.randrange(9), "b": rng.choice(["x", "ü"])}
        arguments = json.dumps(arguments, separators=spacing, ensure_ascii=False)
        call = family.call.format(name="add", arguments=arguments)
        text, end = (text + rng.choice(["\n", ""]) + call).lstrip(), family.call_end or end
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if rng.random() < 0.1:
        ids.append(tokenizer(chr(0x1F600), add_special_tokens=False)["input_ids"][0])  # no whole character
    return [*ids, tokenizer.convert_tokens_to_ids(end)]


async def converse(rng, session, engine, family, tokenizer):
    """A conversation of a few turns, in which the program sometimes rewrites or branches. Returns it."""
    messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
    for _ in range(rng.randint(1, 5)):
        answers = rng.choice([1, 1, 1, 2])
        engine.says = [utterance(rng, family, tokenizer) for _ in range(answers)]
        limit = rng.choice([None, None, None, 3])
        asked = (session.chat(messages, TOOLS, max_new_tokens=limit) for _ in range(answers))
        reply = (await asyncio.gather(*asked))[0]
        said = dict(reply.message)
        if rng.random() < 0.3:
            said.pop("reasoning_content", None)  # clients often do not send it back
        if rng.random() < 0.1:
            said["content"] = f"edited {said['content']}"
        messages = [*messages, said]
        if said.get("tool_calls"):
            results = [
                {"role": "tool", "content": str(rng.random()), "name": "add", "tool_call_id": call["id"]}
                for call in said["tool_calls"]
            ]
            messages += results
        else:
            messages.append({"role": "user", "content": rng.choice(QUESTIONS)})
    return messages


def format_of(name, tokenizer):
    """How the family's conversations become tokens, and how its models speak."""
    if name in RENDERED:
        base = pytest.importorskip("renderers.base", reason="needs asyncrl[agents]")
        configs = pytest.importorskip("renderers.configs")
        renderer = base.create_renderer(tokenizer, configs.config_from_name(name))
        return RendererChat(tokenizer, renderer), RENDERED[name]
    own = deepcopy(tokenizer)
    own.chat_template, end = FAMILIES[name]
    return TemplateChat(own, [own.convert_tokens_to_ids(end)]), Rendered(end, TAGGED_CALL)


def test_of_a_prompt_that_is_far_too_long_only_a_beginning_without_room_is_tokenised():
    tokenizer, room = byte_tokenizer(4096), 100
    bounded, whole = TemplateChat(tokenizer, [], context_tokens=room), TemplateChat(tokenizer, [])

    def asked(content):
        messages = [{"role": "user", "content": content}]
        return bounded.render(messages, None), whole.render(messages, None)

    cut, full = asked("a" * 100_000)
    assert room < len(cut) < 10 * room and full[: len(cut)] == cut
    for content in ("a" * 500, "<|im_start|>" * 80 + "a"):  # the latter has long tokens, and there is room
        cut, full = asked(content)
        assert cut == full
    hello = [{"role": "user", "content": "hello"}]
    said = np.array([*bounded.encode("yes"), tokenizer.eos_token_id], np.int32)
    completion = Completion(said, np.zeros(len(said), np.float32), (), FinishReason.STOP)
    messages = [*hello, {"role": "assistant", "content": "yes"}]
    turn = Turn(np.array(bounded.render(hello, None), np.int32), completion, messages)
    assert room < len(bounded.extend(turn, [{"role": "user", "content": "a" * 100_000}])) < 10 * room


@pytest.mark.parametrize(
    ("said", "content", "arguments"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": "\\ud83d"}}</tool_call>', "", '{"a": "\ufffd"}'),
        ('<tool_call>{"name": "add", "arguments": "\\ud83d\\ude00"}</tool_call>', "", "\U0001f600"),
        (f'<tool_call>{{"name": "add", "arguments": {"1" * 5000}}}</tool_call>', None, None),
        ("<tool_call>{" * 100_000, None, None),  # in time that grows with it
        (
            '<tool_call>{"name": "add"}</tool_call>\n<tool_call>{"name": subtract}</tool_call>',
            '<tool_call>{"name": subtract}</tool_call>',
            "{}",
        ),
    ],
)
def test_whatever_is_called_can_be_sent_and_shown_again_and_what_is_no_call_stays(said, content, arguments):
    own = byte_tokenizer(4096)
    own.chat_template = FAMILIES["hermes"][0]
    chat = TemplateChat(own, [own.eos_token_id])
    message = chat.parse(np.array([*chat.encode(said), own.eos_token_id]), np.array([5]), TOOLS)
    assert message["content"] == (said if content is None else content)
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    assert calls == ([] if arguments is None else [arguments])
    wire.frame(wire.Told(1, 0, message))
    assert chat.render([{"role": "user", "content": "?"}, message], TOOLS)


def test_a_conversation_goes_on_from_the_answer_that_its_program_has_seen(tokenizer, model, one_thread):
    """Of two that say the same after other thoughts, as programs side by side get them. A text that ended an
    answer gives nothing up: the next turn may yet go on from that."""
    chat, family = format_of("reasoning", tokenizer)
    call = family.call.format(name="add", arguments='{"a": 1}')
    said = [[*chat.encode(f"<think>\n{thought}\n</think>\n\n{call}"), 7] for thought in ("one", "two")]
    engine = Ventriloquist(model)
    task = RolloutTask(0, 0, 0, 0, "say", [5], {}, 1, SamplingParams(99))
    session = Conversation(task, 0, engine, seed=0, chat=chat)

    async def run():
        asked = [{"role": "user", "content": "?"}]
        engine.says = [*said, said[0], said[0]]
        replies = [await session.chat(asked, TOOLS, stop=["</tool_call>"]) for _ in said]
        for reply in reversed(replies):
            result = {"role": "tool", "content": "2", "name": "add"}
            more = await session.chat([*asked, reply.message, result], TOOLS)
            before = np.concatenate([reply.prompt_ids, reply.completion.token_ids])
            assert more.prompt_ids[: len(before)].tolist() == before.tolist()

    asyncio.run(run())
    assert len(session.trajectories()) == 2


TEMPLATE_SPLITS = {"reasoning", "qwen3", "glm-4.5"}
"""Families of which the template, or the renderer, drops the reasoning when a question follows."""


@pytest.mark.parametrize("name", [*FAMILIES, *RENDERED])
def test_every_trained_token_was_sampled_in_the_context_that_is_trained_on(
    name, tokenizer, model, one_thread
):
    chat, family = format_of(name, tokenizer)
    counts = Counter()
    for seed in range(8):
        rng = random.Random(seed)
        engine = Ventriloquist(model)
        task = RolloutTask(0, 0, 0, 0, "say", [5], {}, 1, SamplingParams(64))
        session = Conversation(task, 0, engine, seed=0, chat=chat)
        messages = asyncio.run(converse(rng, session, engine, family, tokenizer))
        counts["calls"] += sum("tool_calls" in message for message in messages)
        trajectories = session.trajectories()
        recorded = []
        for number, t in enumerate(trajectories):
            assert t.segment == number
            found = logprobs(model, t.token_ids)
            np.testing.assert_allclose(
                t.behavior_logprobs[t.loss_mask], found[t.loss_mask], rtol=1e-3, atol=1e-4
            )
            assert (t.behavior_logprobs[~t.loss_mask] == 0).all()
            assert t.sampled_tokens == t.loss_mask.sum()
            assert list(t.versions) == sorted(t.versions, key=lambda span: span.version)
            recorded += [t.token_ids[s.start : s.start + s.length].tolist() for s in t.versions]
            counts["turns beyond the first of a segment"] += len(t.versions) - 1
            counts[t.metadata.get("split")] += 1
        assert sorted(recorded) == sorted(engine.ids), "each was sampled once, and is trained on once"
    assert counts["turns beyond the first of a segment"] > 5
    assert counts["history"] > 0
    assert counts["calls"] > 0
    if name in TEMPLATE_SPLITS:
        assert counts["template"] > 0
