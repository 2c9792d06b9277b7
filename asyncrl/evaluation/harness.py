"""Suites through lm-evaluation-harness (EleutherAI, the package `lm_eval`): its tasks and its scoring, by an
engine of ours as its model. What it has no task for is scored as ever."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval import tasks as all_tasks
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from asyncrl.config import Config
from asyncrl.config.evaluation import SuiteConfig
from asyncrl.core.records import FinishReason
from asyncrl.data.prompts import BadRow
from asyncrl.data.rows import read_rows
from asyncrl.data.suites.rows import source
from asyncrl.data.suites.table import SUITES, HarnessTask
from asyncrl.data.tokenise import AddedTokens
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.evaluation import scores
from asyncrl.evaluation.evaluate import VERSION, Evaluation, evaluate, for_people
from asyncrl.evaluation.sets import first, held_out
from asyncrl.evaluation.suites import by_area
from asyncrl.reward.text import response_text
from asyncrl.rollout.engines.base import Engine, GenerationRequest
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.task import sampling_of
from asyncrl.section import with_values
from asyncrl.trainer.models.packed import load_decoder
from asyncrl.weights.source import LocalWeights

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel

TASKS = Path(all_tasks.__file__).parent
SPLITS = ("train", "validation", "test")


async def evaluate_by_harness(config: Config, limit: int | None) -> Evaluation:
    """As `evaluate`, of the suites that the harness has a task for by its rules, and of the others by ours.
    limit: use only the first `limit` prompts of each. Raises `ConfigError` and `RunFailed`."""
    assert config.evaluation is not None
    if config.evaluation.responses(config.rollout) > 1:
        raise ConfigError("--harness scores one response to each prompt; use evaluation.samples=1")
    suites = config.evaluation.suites
    settings = {suite.name: _settings(config, i, suite) for i, suite in enumerate(suites)}
    tasks = [_loaded(each) for each in settings.values() if each is not None]
    config = with_values(config, config.evaluation.rollout(config.rollout))
    try:
        found = await _sampled(config, tasks, limit) if tasks else None
    except ExceptionGroup as failures:
        raise for_people(failures) from failures
    rest = [suite for suite in suites if settings[suite.name] is None]
    if not rest:
        assert found is not None
        return found
    config = with_values(config, {"evaluation.suites": rest})
    ours = await evaluate(config, first(held_out(config), limit))
    return ours if found is None else _joined(found, ours, [suite.name for suite in suites])


def _settings(config: Config, i: int, suite: SuiteConfig) -> dict[str, Any] | None:
    """Of the harness's task for a suite, with rows of ours where they are not the task's own; None where it
    has none. The suites of this package are asked as we ask them."""
    assert config.evaluation is not None
    of = SUITES[suite.name]
    if of.harness is None:
        return None
    task = load_yaml(TASKS / f"{of.harness.file}.yaml", resolve_func=True) | {"task": suite.name}
    if suite.path is None and not of.is_shipped:
        return task
    data = config.evaluation.suite_data(config.data).datasets[i]
    read = [row for row in read_rows(source(data, of)) if not isinstance(row, BadRow)]
    rows = [columns | ({"asked": of.ask(columns)[0]} if of.is_shipped else {}) for _, columns in read]
    task["custom_dataset"] = lambda **_: dict.fromkeys(SPLITS, Dataset.from_list(rows))
    asked = {"doc_to_text": "{{asked}}", "description": "", "num_fewshot": 0}
    return task | (asked if of.is_shipped else {})


def _loaded(settings: Mapping[str, Any]) -> Task:
    """With its rows. Raises `NotHereError`."""
    name = settings["task"]
    try:
        loaded: Task = TaskManager(include_defaults=False).load([dict(settings)])["tasks"][name]
        return loaded
    except Exception as error:  # whatever a task needs that is not here has an error of its own
        raise NotHereError(
            f"--suite {name}: lm-evaluation-harness cannot load it: {type(error).__name__}: {error}",
            command=f"name its rows: --suite {name}=FILE.jsonl",
        ) from error


async def _sampled(config: Config, tasks: Sequence[Task], limit: int | None) -> Evaluation:
    """By an engine that runs in this loop, while the harness waits for it in a thread."""
    on_cpu = with_values(config, {"trainer.device": "cpu"})
    weights = load_decoder("model.path", config.model.path, on_cpu)
    engine = make_engine(config, config.data.max_prompt_tokens, shares_gpu=True)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        running = await stack.enter_async_context(asyncio.TaskGroup())
        driving = running.create_task(engine.run())
        await engine.update_weights(LocalWeights(VERSION, weights.state_dict()))
        model = EngineModel(config, engine, weights)
        results = await asyncio.to_thread(
            simple_evaluate,
            model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            system_instruction=config.data.system_prompt,
            apply_chat_template=True,
        )
        driving.cancel()
    names = [task.task_name for task in tasks]
    by_prompt = {name: tuple(_scores(results["samples"][name], SUITES[name].harness)) for name in names}
    values = list(itertools.chain(*by_prompt.values()))
    metrics = {}
    for name, of_suite in by_prompt.items():
        mean, error = scores.mean_and_error(of_suite)
        metrics[f"eval/{name}/reward/mean"] = mean
        metrics |= {f"eval/{name}/reward/stderr": error} if math.isfinite(error) else {}
    lengths, cut = (statistics.fmean(each) for each in zip(*model.ended, strict=True))
    areas = by_area(by_prompt)
    return Evaluation(len(values), (), tuple(values), {}, lengths, cut, metrics, by_prompt, areas)


def _scores(samples: Sequence[Mapping[str, Any]], task: HarnessTask | None) -> Iterator[float]:
    """Of the responses to each prompt, in their order."""
    assert task is not None
    looked_at = [sample for sample in samples if sample["filter"] == task.filter]
    return (float(sample[task.metric]) for sample in sorted(looked_at, key=lambda sample: sample["doc_id"]))


def _joined(a: Evaluation, b: Evaluation, order: Sequence[str]) -> Evaluation:
    both = a.by_prompt | b.by_prompt
    by_prompt = {name: both[name] for name in order}
    share = len(a.rewards) / (len(a.rewards) + len(b.rewards))
    return Evaluation(
        a.prompts + b.prompts,
        b.samples,
        a.rewards + b.rewards,
        b.parts,
        share * a.response_tokens + (1 - share) * b.response_tokens,
        share * a.truncated_frac + (1 - share) * b.truncated_frac,
        a.metrics | b.metrics,
        by_prompt,
        by_area(by_prompt),
        b.failures,
    )


class EngineModel(TemplateLM):
    """An engine as the harness's model; made in the loop that drives the engine, asked in another thread.

    model: with the same weights, for the likelihood of given texts, which no engine tells. It computes where
    it is. Sampling is the config's, and so is the longest response.
    """

    def __init__(self, config: Config, engine: Engine, model: PreTrainedModel) -> None:
        super().__init__()
        self._config = config
        self._engine = engine
        self._model = model
        self._tokenizer = load_tokenizer(config.model)
        self._text_of = response_text(config)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self.ended: list[tuple[int, bool]] = []
        """Of each response, its tokens, and whether it was cut off."""

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self._config.model.path

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._config.data.chat_template_kwargs,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What a text's special tokens are, the template has written; a beginning of sequence comes once."""
        ids: list[int] = self._tokenizer(string, add_special_tokens=False)["input_ids"]
        before = list(AddedTokens.of(self._tokenizer).before) if add_special_tokens else []
        return ids if ids[: len(before)] == before else before + ids

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = asyncio.run_coroutine_threadsafe(self._generate([r.args for r in requests]), self._loop)
        return asked.result()  # the engine's end cancels it, and a request has a longest response

    async def _generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        async with asyncio.TaskGroup() as all_:
            tasks = [all_.create_task(self._response(*request)) for request in requests]
        ended = [task.result() for task in tasks]
        self.ended += [(tokens, is_cut) for _, tokens, is_cut in ended]
        return [text for text, *_ in ended]

    async def _response(self, prompt: str, settings: Mapping[str, Any]) -> tuple[str, int, bool]:
        """Text up to the first of the texts that end it, tokens, and whether it was cut off."""
        ids = self.tok_encode(prompt)[-self._config.data.max_prompt_tokens :]
        number = next(self._numbers)
        sampling = replace(sampling_of(self._config.rollout), seed=self._config.run.seed + number)
        request = GenerationRequest(f"harness-{number}", np.array(ids, np.int32), sampling)
        sampled: list[int] = []
        async for chunk in self._engine.generate(request):
            sampled += chunk.token_ids.tolist()
            reason = chunk.finish_reason
        text = self._text_of(sampled)
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.partition(end)[0] if end else text
        return text, len(sampled), reason is FinishReason.LENGTH

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each the tokens before, and those whose log-probability is asked."""
        return [self._likelihood(before, ids) for _, before, ids in requests]

    @torch.no_grad()
    def _likelihood(self, before: Sequence[int], ids: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of `ids` after `before`, and whether each of them is the likeliest."""
        whole = torch.tensor([[*before, *ids]], device=self._model.device)
        logits = self._model(whole[:, :-1]).logits[0, -len(ids) :].float()
        wanted = whole[0, -len(ids) :]
        logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])
        return float(logprobs.sum()), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        longest = self._config.data.max_prompt_tokens
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, longest, 1)
            found.append(sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows))
        return found
