"""Answers are scored by reasoning-gym's own tasks."""

import ast
import asyncio
import json
import os
import pickle
import struct

import msgspec
import pytest
from optional import optional
from reward_pools import request, running_pool

from asyncrl.config import DataConfig
from asyncrl.data.rows import read_rows
from asyncrl.reward.verifiers.reasoning_gym import PROCESS, reasoning_gym

optional("reasoning_gym", reason="needs asyncrl[reasoning-gym]")


@pytest.fixture(autouse=True)
def end_process(no_process_left):
    yield
    PROCESS.close()


def row_of(task, **options):
    ((_, row),) = read_rows(DataConfig(path=f"reasoning-gym:{task}", options={"size": 1, **options}))
    return msgspec.msgpack.decode(msgspec.msgpack.encode(row))


def scores(row, *answers):
    return reasoning_gym(answers, [row["reasoning_gym"]] * len(answers))


@pytest.mark.parametrize(
    "task",
    [
        "chain_sum",
        "arc_agi",  # tells tuples from lists
        "knights_knaves",  # has values of NumPy
        "isomorphic_strings",  # depends on the order of sets
        "prime_factorization",  # lets the errors of a parser through
        "string_insertion",  # runs the answer as Python
        "countdown",  # and so does SymPy
    ],
)
def test_its_own_answer_is_right_and_what_it_cannot_read_is_wrong(task):
    row = row_of(task)
    right = row["answer"]
    given = [right, f"<answer>1</answer> no, <answer> {right}\n</answer>, I think", "<answer>no</answer>"]
    assert scores(row, *given) == [1.0, 1.0, pytest.approx(0.0, abs=0.1)]


def test_numbers_are_keys_of_an_entry():
    row = row_of("graph_color")
    colours = ast.literal_eval(row["reasoning_gym"]["entry"])["metadata"]["possible_answer"]
    one_for_all = dict.fromkeys(colours, 1)
    assert scores(row, json.dumps(colours), json.dumps(one_for_all)) == [1.0, 0.01]


def test_an_answer_that_is_run_reaches_nothing_and_its_siblings_keep_their_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_A_TEST", "known")
    told = tmp_path / "told"
    row = row_of("string_insertion")
    answers = [
        f"[open({str(told)!r}, 'w').write('x')]",
        f"[__import__('os').system('touch {told}')]",
        "[str(__import__('socket').create_connection(('127.0.0.1', 9)))]",
        f"[c for c in {row['answer']!r} if 'TOKEN_OF_A_TEST' in __import__('os').environ]",
        f"[c for c in {row['answer']!r} if not __import__('os').kill({os.getpid()}, 0)]",
        "[exit()]",
        "[9**9**9**9]",
        f"[c for c in {row['answer']!r}]",
    ]
    assert scores(row, *answers) == [*[0.0] * 7, 0.1]  # what the task gives for the right characters
    assert not told.exists()


def test_a_reply_that_an_answer_forges_runs_nothing_here(tmp_path):
    told = tmp_path / "told"

    class Forged:
        def __reduce__(self):
            return exec, (f"open({str(told)!r}, 'w')",)

    data = pickle.dumps(Forged())
    message = struct.pack("!i", len(data)) + data
    write = f"import os\nfor fd in range(3, 99):\n try: os.write(fd, {message!r})\n except OSError: pass"
    answers = [f"[exec({write!r})]", "no"]
    assert scores(row_of("string_insertion"), *answers) == [0.0, 0.0]
    assert not told.exists()


def test_a_task_that_cannot_score_its_own_answer_is_an_error_and_no_reward():
    row = row_of("prime_factorization")
    row["reasoning_gym"]["entry"] = "{'answer': 'x', 'metadata': {}}"
    with pytest.raises(
        ValueError, match="`prime_factorization` cannot score its own answer: ValueError: inv"
    ):
        scores(row, "y")


def test_a_runs_rewards_score_by_the_column():
    row = row_of("countdown")
    columns = {name: value for name, value in row.items() if name != "prompt"}
    function = {"function": "asyncrl.reward.verifiers.reasoning_gym:reasoning_gym"}

    async def main():
        async with running_pool(function, retries=0) as pool:
            return await pool.score(request([row["answer"], "7"], **columns))

    right, wrong = (score.reward for score in asyncio.run(main()))
    assert (right, wrong) == (1.0, pytest.approx(0.05))
