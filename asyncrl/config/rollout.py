"""Settings of rollout workers and their engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from asyncrl.section import Section


class PacedEngineConfig(Section):
    step_base_s: float = Field(0.010, ge=0)
    """Time of a decode step with nothing in it."""
    step_per_request_s: float = Field(0.0001, ge=0)
    """Time that each running request adds to a decode step."""
    min_new_tokens: int = Field(1, ge=1)
    """Response lengths are uniform from here to `rollout.max_new_tokens`, by the request's seed."""


class TorchEngineConfig(Section):
    cuda_graphs: bool = False
    """Capture decode steps as CUDA graphs, on a GPU: faster steps, and a pause at the first of each shape."""


class VllmEngineConfig(Section):
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of each GPU's memory that an engine takes, weights included. Where the trainer shares the GPU it
    has to be lower: a value that would leave the trainer too little is refused, with the one to use."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs: a slower start, faster steps."""
    prefill_tokens: int | None = Field(None, ge=1)
    """Tokens computed in one step, at most (vLLM's `max_num_batched_tokens`); null: 8,192 on a GPU, 2,048 on
    the CPU."""
    answer_timeout_s: float = Field(120.0, gt=0)
    """An engine that answers nothing, or generates nothing with requests running, for this long is taken for
    hung and replaced."""


class HttpEngineConfig(Section):
    urls: list[str] = Field([])
    """The servers, each as `http://HOST:PORT`. One worker drives them all."""
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


class RolloutConfig(Section):
    engine: Literal["torch", "vllm", "http", "paced"] = "torch"
    """`torch`: the embedded engine. `vllm`: vLLM, in processes of its own. `http`: running vLLM servers that
    somebody else operates. `paced`: waits as long as a GPU would take instead of computing (benchmarks)."""
    workers: int = Field(1, ge=1)
    """Rollout worker processes, each with an engine of its own."""
    slots: int = Field(64, ge=1)
    """Requests that decode at the same time, per worker (with `http`, on all servers together)."""
    group_size: int = Field(8, ge=1)
    """Responses sampled for each prompt."""
    max_new_tokens: int = Field(256, ge=1)
    """Most tokens that are sampled by one request: of a response, or of one turn of an episode."""
    max_sequence_tokens: int | None = Field(None, ge=2)
    """Longest sequence, the prompt and all turns included; by default the longest prompt of the data and
    `max_new_tokens`, which is room for one turn."""
    episode: str | None = None
    """How a response comes about where that takes more than one request to the model (docs/episodes.md):
    `package.module:function` or `path/file.py:function`, an `async def` of a task and a function that
    samples. By default it is one request."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0 is off."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([])
    """Token ids that end a response, besides the model's own end-of-sequence tokens."""
    kv_on_update: Literal["keep", "recompute", "resubmit"] = "keep"
    """On a weight update, `keep` the running requests' keys and values (and recurrent states) of the old
    weights, or `recompute` them in place. `resubmit` (vLLM only) recomputes by taking the requests back and
    sending them again with the tokens so far."""
    max_attempts: int = Field(3, ge=1)
    """Attempts at a group (after failed rewards or lost workers) before it is counted as failed."""
    max_restarts: int = Field(5, ge=0)
    """How often each worker is started again after deaths within an hour, at once at first and then with
    growing delays, before the run ends."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engines run."""
    threads: int = Field(1, ge=1)
    """CPU threads of each worker's engine."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks over which each vLLM engine splits the model: processes on the CPU, GPUs elsewhere."""
    torch: TorchEngineConfig = TorchEngineConfig()
    vllm: VllmEngineConfig = VllmEngineConfig()
    http: HttpEngineConfig = HttpEngineConfig()
    paced: PacedEngineConfig = PacedEngineConfig()

    def context_tokens(self, longest_prompt_tokens: int) -> int:
        """The longest sequence that engines and trainers must have room for."""
        return self.max_sequence_tokens or longest_prompt_tokens + self.max_new_tokens
