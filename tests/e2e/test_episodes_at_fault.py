"""A whole run of episodes of which each has another fault at its first attempt, and none at its second."""

import json

import pytest

import asyncrl
from asyncrl.observe.metrics import read_metrics

pytest.importorskip("aiohttp")

import judge_server

FAULTY = '''
import asyncio
import json
import os
import signal
import socket
from urllib.parse import urlsplit


async def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


async def hangs():
    """A tool that never answers."""
    await asyncio.sleep(3600)


async def vanishes(model):
    """A client that is gone before its reply. Request and end arrive together, on a busy machine too."""
    host, port = urlsplit(model.base_url).netloc.split(":")
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "hello"}]})
    head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {model.api_key}"]
    head += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", body]
    _, writer = await asyncio.open_connection(host, int(port))
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    writer.write("\\r\\n".join(head).encode())
    await writer.drain()
    writer.close()


async def episode(task, model):
    fault, is_first = task.columns["fault"], task.attempt == 0
    if fault == "client":
        await vanishes(model)
    reply = await model.chat(task.prompt)
    if fault == "killed" and is_first:
        await is_killed()
    elif fault == "tool" and is_first:
        await hangs()
    return None if fault == "judge" else float(len(reply.text) % 5)
'''
FAULTS = ("killed", "tool", "client", "judge")


def test_what_goes_wrong_is_counted_and_tried_again_and_not_trained_on(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.05)
    (tmp_path / "faulty.py").write_text(FAULTY)
    rows = [{"prompt": [{"role": "user", "content": "say"}], "fault": fault} for fault in FAULTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = [*["oops"] * 2, *["eight, I would say"] * 2]

    def rule(question):
        said = replies.pop(0) if replies else judge_server.says(score=8)
        return judge_server.web.Response(status=500, text=said) if said == "oops" else said

    with judge_server.serving(rule) as server:
        judge = {"url": server.url, "model": "wise"}
        config = make_config(
            *("run.mode=inline", "run.steps=1", "staleness.max_staleness=0", "rollout.group_size=2"),
            *("rollout.min_new_tokens=12", "rollout.episode_timeout_s=3", "rollout.gateway=true"),
            *(f"data.path={tmp_path / 'rows.jsonl'}", f"rollout.episode={tmp_path / 'faulty.py'}:episode"),
            *("rollout.max_sequence_tokens=128", "reward.functions=[]", "reward.retries=0"),
            f"reward.judges=[{json.dumps(judge)}]",
        )
        run_dir = asyncrl.run(config, progress=False).run_dir
    assert replies == []
    (line,) = read_metrics(run_dir / "metrics.jsonl")
    assert line["ledger/returned_leases"] == 3, "of all but the client, which is no fault of its episode's"
    assert line["gateway/lost_frac"] > 0
    assert line["ledger/trained_groups"] == line["ledger/generated_groups"] == len(FAULTS)
    fates = ("trained", "masked", "dropped", "failed", "in_flight")
    assert line["ledger/generated_tokens"] == sum(line[f"ledger/{fate}_tokens"] for fate in fates)
    assert line["ledger/failed_tokens"] > 0
    responses, tokens_of_each = 2 * len(FAULTS), 12
    assert line["ledger/trained_tokens"] == responses * tokens_of_each, "and nothing of what the client left"
