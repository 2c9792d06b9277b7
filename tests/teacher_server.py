"""A server that scores prompts as vLLM's does, by a real model; it can fail as real ones do."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class TeacherServer:
    """fails: what it answers to a request in the place of scores, by how many came before it.
    max_model_len: longest sequence that it says it reads."""

    model: Path
    fails: Callable[[int], tuple[int, str] | None] = lambda count: None
    max_model_len: int | None = None
    keys: list[str | None] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.model)
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._lock = threading.Lock()
        self._asked = 0

    def answer(self, path: str, body: dict) -> tuple[int, object]:
        with self._lock:  # a model that several threads may ask
            return self._answer(path, body)

    def _answer(self, path: str, body: dict) -> tuple[int, object]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "wise", "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            ids = self._tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return 200, {"tokens": ids["input_ids"]}
        assert (path, body["model"]) == ("/v1/completions", "wise")
        self._asked += 1
        if (failure := self.fails(self._asked - 1)) is not None:
            return failure
        self.scored.append(body["prompt"])
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            logprobs = self._model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        given = [None, *({str(i): {"logprob": p}} for i, p in zip(body["prompt"][1:], found, strict=True))]
        return 200, {"choices": [{"text": "", "prompt_logprobs": given}]}


@contextmanager
def serving(model: Path, **settings) -> Iterator[TeacherServer]:
    """The server, in threads of its own, while the body runs."""
    server = TeacherServer(model, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            server.keys.append(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = server.answer(self.path, json.loads(body or "{}"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *told: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join(30)
