"""Real vLLM servers for the tests. A start as the documentation has it takes half a minute, one forked from a
process that has imported vLLM a few seconds."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from forked_server import import_vllm, start
from ports import free_port

START_S = 600.0


class VllmServer:
    """Starts at once; `wait` for it. `options` go to its command line as they are. chats: whether it has a
    tokenizer, for OpenAI's chat API. typed: as the documentation says, not forked."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *options: str,
        port: int | None = None,
        chats: bool = False,
        typed: bool = False,
    ):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        if not typed:
            import_vllm()
        with log.open("a") as output:
            self.process = start(
                "vllm.entrypoints.openai.api_server" if typed else "forked_vllm",
                *("--host", "127.0.0.1", "--port", str(self.port), "--model", str(model)),
                *("--logprobs-mode", "processed_logprobs", "--dtype", "float32"),
                *(() if chats else ("--tokens-only",)),
                *("--no-enable-chunked-prefill", "--enforce-eager"),
                *("--kv-cache-memory-bytes", str(64 << 20)),
                *("--worker-extension-cls", "vllm_worker.WorkerForTests"),
                *options,
                output=output,
                typed=typed,
                environment=environment,
            )

    def wait(self) -> "VllmServer":
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, f"the server has ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the server is not up:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, path: str, body: object = None) -> Any:
        """GET, or POST a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def call(self, method: str, *args: object) -> None:
        """Call a method of its workers (see `vllm_worker`)."""
        self.ask("/collective_rpc", {"method": method, "args": args})

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """At once and altogether. May be called more than once."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(60)
