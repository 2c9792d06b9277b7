"""A server with OpenAI's chat API whose model answers by a rule; it can fail as real ones do."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

Answer = str | web.Response | None


@dataclass
class JudgeServer:
    """rule: what it says to a question; a `web.Response` is sent as it is, None hangs."""

    rule: Callable[[str], Answer]
    questions: list[str] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)
    at_a_time: int = 0
    most_at_a_time: int = 0
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        question = body["messages"][-1]["content"]
        self.bodies.append(body)
        self.questions.append(question)
        self.came_s.append(time.monotonic())
        self.keys.append(request.headers.get("Authorization"))
        self.at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        try:
            await asyncio.sleep(0.01)  # so that requests may overlap
            said = self.rule(question)
            if said is None:
                await asyncio.sleep(3600)
            if isinstance(said, web.Response):
                return said
            usage = {"prompt_tokens": len(question.split()), "completion_tokens": len(str(said).split())}
            message = {"role": "assistant", "content": said}
            return web.json_response({"choices": [{"message": message}], "usage": usage})
        finally:
            self.at_a_time -= 1


@contextmanager
def serving(rule: Callable[[str], Answer]) -> Iterator[JudgeServer]:
    """The server, in a thread of its own, while the body runs."""
    server, ready, loop = JudgeServer(rule), threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.answer)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60), "the server is not up"
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def says(**verdict: object) -> str:
    """A reply as models write it: thought, prose, a fence."""
    text = json.dumps(verdict)
    return f'<think>{{"score": 1}} or so?</think>\nIt is {{good}}.\n```json\n{text}\n```\n'


def between(question: str, name: str) -> str:
    """What the package's own prompts have within the tags of this name."""
    return re.search(rf"<{name}-[0-9a-f]+>\n(.*?)\n</{name}-", question, re.S)[1]


def busy(wait_s: float = 0.0) -> web.Response:
    return web.Response(status=429, headers={"Retry-After": f"{wait_s:g}"}, text="slow down")
