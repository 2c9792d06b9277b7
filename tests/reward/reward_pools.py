"""Rewards over real child processes, and waiting for what happens in them."""

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from asyncrl.config import RewardConfig
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import ScoreRequest

FUNCTIONS = Path(__file__).with_name("functions_for_tests.py")
DEADLINE_S = 60.0


def reward_config(*names: str, **settings) -> RewardConfig:
    functions = [name if isinstance(name, dict) else {"function": f"{FUNCTIONS}:{name}"} for name in names]
    return RewardConfig.model_validate({"functions": functions} | settings)


@asynccontextmanager
async def running_pool(*names: str, **settings):
    pool = Rewards(reward_config(*names, **settings), {}, max_steps=100, max_tokens=10)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def request(completions=("ab", "abc"), *, prompt="say", version=7, **columns) -> ScoreRequest:
    ids = [list(text.encode()) for text in completions]
    return ScoreRequest(prompt, list(completions), ids, columns, version)


async def until(condition, what: str):
    """Wait for `condition()` to be true; the value it then has."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"waited {DEADLINE_S:g} s for {what}"
        await asyncio.sleep(0.005)
    return value


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
