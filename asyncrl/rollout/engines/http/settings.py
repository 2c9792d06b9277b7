"""Settings of the engine, `rollout.http`."""

from __future__ import annotations

from pydantic import Field

from asyncrl.section import Section


class Settings(Section):
    """running vLLM servers that somebody else operates."""

    urls: list[str] = Field([])
    """The servers, each as `http://HOST:PORT`. One worker drives them all."""
    evaluation_urls: list[str] = Field([])
    """Further servers, which score versions beside the training (`evaluation`) and do nothing else: they keep
    a version until its round is done. They find it in `weights_dir`, too."""
    weights_dir: str | None = None
    """A folder that this machine and all servers see under the same path: weight versions go through it,
    two at a time. On one host `/dev/shm/NAME` is fastest. One run at a time can use it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key, where they ask for one."""
    answer_timeout_s: float = Field(10.0, gt=0)
    """A server that does not answer for this long is taken for dead: the others get its requests. It serves
    again once it answers and has the newest weights."""
    load_timeout_s: float = Field(60.0, gt=0)
    """The same, while it loads a weight version; keep it below `weights.ack_timeout_s`."""
    stall_timeout_s: float = Field(120.0, gt=0)
    """The same, for a server that answers and generates nothing with requests running."""
    patience_s: float = Field(120.0, gt=0)
    """With no server left, the run ends after this long."""
