"""The newest numbers of a run over HTTP, as text for Prometheus."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.observe.metric_table import in_braces, named
from asyncrl.observe.metrics import FILE_NAME, last_line

HOST = "127.0.0.1"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Source: https://prometheus.io/docs/instrumenting/exposition_formats/."""


@contextmanager
def serving_metrics(run_dir: Path, name: str, port: int) -> Iterator[str]:
    """Answers at the URL that it gives, from the run's files, whichever of its processes lives. port: 0 is
    any free one. Raises `ConfigError` where it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "the numbers are at /metrics")
                return
            body = exposition(run_dir, name).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with _bound(port, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/metrics"
        finally:
            server.shutdown()
            thread.join()


def check_port(port: int) -> None:
    """Raises `ConfigError` where nobody can listen."""
    _bound(port, BaseHTTPRequestHandler).server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Somebody has hung up, or got no answer: no matter for the terminal that shows the run."""


def _bound(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        return _Server((HOST, port), handler)
    except OSError as error:
        raise ConfigError(
            f"observe.metrics_port={port}: this machine cannot listen there ({error.strerror}); name another "
            "port, or 0 for any free one"
        ) from None


def exposition(run_dir: Path, name: str) -> str:
    """All numbers of the last line of metrics, each as a gauge `asyncrl_...` with the run's name as a label,
    and others for what a metric's name has in braces; and when the step was finished."""
    path = run_dir / FILE_NAME
    samples: dict[str, list[str]] = {}
    for key, value in last_line(path).items():
        if isinstance(value, int | float) and math.isfinite(value):
            gauge, labels = _gauge(key)
            if gauge not in samples:
                samples[gauge] = [*_head(gauge, key)]
            samples[gauge].append(f"{gauge}{_labels({'run': name} | labels)} {value!r}")
    if samples:
        gauge = "asyncrl_last_step_timestamp_seconds"
        samples[gauge] = [
            *(f"# HELP {gauge} when the newest step was finished", f"# TYPE {gauge} gauge"),
            f"{gauge}{_labels({'run': name})} {path.stat().st_mtime!r}",
        ]
    return "".join(f"{line}\n" for lines in samples.values() for line in lines)


def _gauge(key: str) -> tuple[str, Mapping[str, str]]:
    """The gauge's name and labels. Every name is of the letters that Prometheus takes."""
    labels = in_braces(key)
    if labels and (metric := named(key)) is not None:
        key = re.sub(r"[{}]", "", metric.name)
    return f"asyncrl_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}", labels


def _head(gauge: str, key: str) -> Iterator[str]:
    if (metric := named(key)) is not None:
        unit = f" ({metric.unit})" if metric.unit else ""
        yield f"# HELP {gauge} {_escaped(metric.meaning + unit)}"
    yield f"# TYPE {gauge} gauge"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value, True)}"' for name, value in labels.items()) + "}"


def _escaped(text: str, is_quoted: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if is_quoted else text
