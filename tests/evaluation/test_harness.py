"""The shipped suites through lm-evaluation-harness: the same scores as by our own rules."""

import asyncio
import json

import pytest

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'asyncrl[harness]')"
)

from asyncrl.cli.main import main
from asyncrl.data.rows import read_rows
from asyncrl.data.suites.table import SUITES
from asyncrl.evaluation import harness
from asyncrl.evaluation.harness import EngineModel
from asyncrl.evaluation.suites import for_suites, scoring
from asyncrl.resolve import resolve
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.section import with_values
from asyncrl.trainer.models.packed import load_decoder
from asyncrl.weights.source import LocalWeights

WRITTEN = {
    "mini_math": [
        *(
            "So it is \\boxed{42}.",
            "At first \\boxed{1}. But a step is missing there. It is \\boxed{27}",
            "$x$ is $\\boxed{145}$.",
            "\\boxed{24.5}",
        ),
        *("\\boxed{2}", "\\boxed{x}", "I give up."),
    ],
    "mini_choice": [f"Let me think. The answer is ({letter})." for letter in "ABCD"]
    + ["No answer is known."],
    "mini_instructions": [
        "the sea is wide and blue, please, and the air is cold, please",
        "The air moves",
        "* the first thing is a house\n* the second thing is a wall\n* the third thing is a path",
        "* the snow is white and cold\n* the snow melts in the spring",
        'She said "no" to this and went home, where the fire was warm.',
        '"courage is to go on when everything tells you to stop and to rest"',
        "North of here the needle turns and shows the way. Enjoy the evening.",
        "My answer is yes.",
        '{"name": "Ann", "age": 7}',
        "<<The bread of the house>>\nTake [flour] and [water] and [salt].\n\nP.S. *Bake* it *well* for us.",
        "read a long novel about the sea ****** read a short book of poems about the hills",
        "the river runs slowly\n***\nunder the old bridge",
        "dig a hole\n***\nput the tree into it\n***\nwater it",
        "SECTION 1\nthe fish is fresh and the fish is cheap\nSECTION 2\nthe fish is sold every morning",
        "I am sorry that I cannot come to you. Is there anything else I can help with?",
        "it is warm here and warm there " * 20,
        "",
    ],
}
"""Responses of each kind, right ones to some rows and wrong ones to others."""


@pytest.mark.slow
def test_written_responses_are_scored_alike(tiny_folder):
    for name, texts in WRITTEN.items():
        config = for_suites(None, [name], [], str(tiny_folder))
        (data,) = config.evaluation.suite_data(config.data).datasets
        columns = [row for _, row in read_rows(data)]
        rule = resolve(scoring(config).reward.functions[0].function)
        task = harness._loaded(harness._settings(config, 0, config.evaluation.suites[0]))
        seen = set()
        for text in texts:
            theirs = scores_by_harness(task, SUITES[name].harness, text)
            by_name = {key: [row[key] for row in columns] for key in columns[0] if key != "prompt"}
            ours = list(rule([text] * len(columns), **by_name))
            assert ours == theirs, (name, text)
            seen |= set(ours)
        assert seen == {0.0, 1.0}, name


def scores_by_harness(task, of, text):
    """What a task of the harness makes of one response to all of its rows."""
    task.build_all_requests(rank=0, world_size=1, chat_template=None, apply_chat_template=False)
    for instance in task.instances:
        instance.resps = [text]
        instance.filtered_resps = {}
    task.apply_filters()
    return [
        float(task.process_results(instance.doc, [instance.filtered_resps[of.filter]])[of.metric])
        for instance in task.instances
    ]


@pytest.mark.slow
def test_the_engine_is_its_model_and_the_scores_are_ours(warmed_up_model, tmp_path):
    figures = {}
    for how in ([], ["--harness"]):
        out = tmp_path / "figures.json"
        few = ["--limit", "12", "--out", str(out), "rollout.max_new_tokens=24"]
        assert main(["eval", "--model", str(warmed_up_model), "--suite", "mini", *how, *few]) == 0
        (figures[bool(how)],) = json.loads(out.read_text())
    ours, theirs = figures[False], figures[True]
    for key in ("prompts", "responses", "reward_mean", "areas", "response_tokens", "truncated_frac"):
        assert theirs[key] == pytest.approx(ours[key]), key
    assert 0 < ours["areas"]["instructions"] < 1
    stderr = "eval/mini_instructions/reward/stderr"
    assert theirs["metrics"][stderr] == pytest.approx(ours["metrics"][stderr])


@pytest.mark.slow
def test_the_likelihood_of_what_the_engine_samples_greedily_is_greedy(warmed_up_model):
    from lm_eval.api.instance import Instance

    config = for_suites(None, ["mini_math"], ["rollout.max_new_tokens=6"], str(warmed_up_model))
    config = with_values(config, {"rollout.temperature": 0.0})

    async def ask():
        weights = load_decoder("model.path", config.model.path, config)
        engine = make_engine(config, 64)
        driving = asyncio.create_task(engine.run())
        await engine.update_weights(LocalWeights(0, weights.state_dict()))
        model = EngineModel(config, engine, weights)
        prompt = model.apply_chat_template([{"role": "user", "content": "sort dca"}])

        def asked(kind, *arguments):
            return [Instance(kind, {}, arguments, 0)]

        (text,) = await asyncio.to_thread(
            model.generate_until, asked("generate_until", prompt, {"until": []})
        )
        (cut,) = await asyncio.to_thread(
            model.generate_until, asked("generate_until", prompt, {"until": [text[1]]})
        )
        assert cut == text.partition(text[1])[0]
        before, ids = model.tok_encode(prompt), model.tok_encode(text)
        greedy, other = model._loglikelihood_tokens([(None, before, ids), (None, before, [*ids[::-1], 5])])
        ((alone, _),) = model.loglikelihood(asked("loglikelihood", "", text))
        (rolled,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", text))
        driving.cancel()
        await engine.close()
        assert greedy[1] and not other[1]
        assert 0 > greedy[0] > other[0]
        assert rolled == pytest.approx(alone, abs=1e-4)

    asyncio.run(ask())


def test_what_the_harness_cannot_do_is_refused(tiny_folder, capsys):
    command = ["eval", "--model", str(tiny_folder), "--harness"]
    assert main([*command, "--config", "quickstart.yaml"]) == 2
    assert "--harness scores suites (--suite NAME)" in capsys.readouterr().err
    several = ["evaluation.temperature=1", "evaluation.samples=2"]
    assert main([*command, "--suite", "mini_math", *several]) == 2
    assert "--harness scores one response to each prompt" in capsys.readouterr().err
