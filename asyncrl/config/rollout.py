"""Settings of rollout workers and their engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from asyncrl.config.own import named
from asyncrl.section import Section
from asyncrl.specs import choices, spec_name, with_sections

ENGINES = "rollout/engines"
"""The folder of those that come with the package."""


@with_sections(ENGINES)
class RolloutConfig(Section):
    engine: Annotated[str, AfterValidator(spec_name(ENGINES))] = Field("torch", description=choices(ENGINES))
    settings: dict[str, Any] = Field({})
    """Settings of an engine of your own, by its spec's `settings`."""
    workers: int = Field(1, ge=1)
    """Rollout worker processes, each with an engine of its own."""
    guests: int = Field(0, ge=0)
    """Most workers that may join the run and leave it while it goes on (`asyncrl join`, docs/cluster.md),
    beside its own."""
    slots: int = Field(64, ge=1)
    """Requests that decode at the same time, per worker (with `http`, on all servers together)."""
    group_size: int = Field(8, ge=1)
    """Responses of each prompt that are trained on."""
    candidates: int | None = Field(None, ge=2)
    """Responses sampled for each prompt, more than `group_size`, of which `choose` takes so many; null is no
    more."""
    choose: Annotated[str, named(("first", "max_variance", "greedy_baseline"))] = "first"
    """`candidates`: which of them are trained on. `first`: those that are done first; the others are
    cancelled, which favours short responses. `max_variance`: those whose rewards have the greatest variance
    (PODS). Or your own, given `rewards`, `tokens`, `size` and columns of the row by name:
    `package.module:function` or `path/file.py:function`. `greedy_baseline`, without `candidates`: one more is
    sampled, at temperature 0, whose reward is the baseline of `objective.advantage: remax`."""
    max_new_tokens: int = Field(256, ge=1)
    """Most tokens that are sampled by one request: of a response, or of one turn of an episode."""
    min_new_tokens: int = Field(0, ge=0)
    """Before so many, no token is sampled that ends the request."""
    max_sequence_tokens: int | None = Field(None, ge=2)
    """Longest sequence, the prompt and all turns included; by default the longest prompt of the data and
    `max_new_tokens`, which is room for one turn."""
    episode: str | None = None
    """How a response comes about where that takes more than one request to the model (docs/tasks.md):
    `package.module:name` or `path/file.py:name`, an `async def` of a task and a model. By default it is one
    request."""
    episode_turns: int = Field(64, ge=1)
    """Requests that an episode may make to the model; further ones get no tokens, and the response counts as
    cut off."""
    episode_timeout_s: float = Field(60.0, gt=0)
    """Seconds that an episode may take beside its waits for the model; then the attempt has failed."""
    episode_processes: int = Field(1, ge=1)
    """Processes per rollout worker in which the episodes run, many side by side in each."""
    episode_guests: int = Field(0, ge=0)
    """Most machines that may join the run and leave it while it goes on, to carry out episodes (`asyncrl join
    --episodes`, docs/cluster.md). Episodes go there first, and run beside the engine where no process of
    theirs is free."""
    kept_contexts: int | None = Field(None, ge=0)
    """Contexts of episodes that wait for something else than the model (a tool), kept beside those in the
    slots, so that the next turn computes only what is new. Each takes as much memory as a slot. null: as many
    as `slots` with an `episode`, otherwise none. A vLLM that has its GPU to itself, or runs as somebody's
    server, keeps what it has room for."""
    gateway: bool = False
    """Whether an episode's model also answers over HTTP (`model.base_url`, `model.api_key`), by the protocols
    of OpenAI and Anthropic, for agents that know nothing of the run (docs/agents.md). Listens at
    `network.bind`."""
    renderer: str = "auto"
    """How an episode's conversations become tokens: a family of the package `renderers` (`qwen3`, `glm-5`,
    ...), or the model's own chat template (`template`). `auto`: the family, where the package is installed
    and knows the model by its hub name."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling, among the 4,096 most likely tokens at most where there is no `top_k`; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0 is off."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([])
    """Token ids that end a response, besides the model's own end-of-sequence tokens."""
    kv_on_update: Literal["keep", "recompute", "resubmit"] = "keep"
    """On a weight update, `keep` the running requests' keys and values (and recurrent states) of the old
    weights, and those of episodes between two turns, or `recompute` them in place (at the next turn).
    `resubmit` (vLLM only) recomputes by taking the requests back and sending them again with the tokens so
    far."""
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
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The section of an engine that comes with the package, from its own folder."""

    @property
    def sampled(self) -> int:
        """Responses sampled for each prompt."""
        return self.candidates or self.group_size + (self.choose == "greedy_baseline")

    @property
    def truncation(self) -> str:
        """The settings by which unlikely tokens are left out; empty where none does."""
        cut = {"top_p": self.top_p if self.top_p < 1 else None, "top_k": self.top_k or None}
        return " and ".join(f"rollout.{key}={value}" for key, value in cut.items() if value is not None)

    @property
    def kept(self) -> int:
        """`kept_contexts`, or their default."""
        return (self.slots if self.episode else 0) if self.kept_contexts is None else self.kept_contexts

    def context_tokens(self, longest_prompt_tokens: int) -> int:
        """The longest sequence that engines and trainers must have room for."""
        return self.max_sequence_tokens or longest_prompt_tokens + self.max_new_tokens
