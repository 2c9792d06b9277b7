"""The run's settings: one typed tree, read from YAML and `key.sub=value` overrides, refused with a remedy
when wrong.

Everything that can be judged without looking at the machine is judged here; what needs the machine (GPUs,
paths, imports) is judged by `asyncrl.plan.preflight`.
"""

from __future__ import annotations

import copy
import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from asyncrl.config import presets, yaml_tree
from asyncrl.config.messages import explain
from asyncrl.config.servers import impossible_servers
from asyncrl.errors import ConfigError
from asyncrl.objective.catalogue import (
    COMPARE_WITHIN_GROUPS,
    GROUP_ADVANTAGES,
    POLICY_LOSSES,
    TOKEN_ADVANTAGES,
    is_own,
)
from asyncrl.resolve import spec_of

VLLM_MAX_TEMPERATURE = 2.0
STEP_STALLS = 6
"""What a step that moves may take, in `run.stall_s`."""
_ANY_RATE = {"contradictions": True}
"""Context of a validation that lets settings contradict each other."""
Share = Annotated[float, Field(ge=0, lt=1)]
__all__ = ["Config", "ConfigError", "InvalidSettings", "dump", "from_tree", "keys", "load"]


def _named(catalogue: Iterable[str]) -> AfterValidator:
    """Refuses what is neither a name of the catalogue nor looks like a user's own function."""

    def check(name: str) -> str:
        if not is_own(name) and name not in catalogue:
            raise ValueError(
                f"there are {', '.join(catalogue)}, and your own as package.module:function or "
                "path/file.py:function"
            )
        return name

    return AfterValidator(check)


def _spec_of_function(function: Any) -> Any:
    """Names of files and modules stay; what is no function either is refused by its type."""
    return spec_of(function, "reward function") if callable(function) else function


def _check_file_name(name: str) -> str:
    if not re.fullmatch(r"[^/\\\0-\x1f\x7f.][^/\\\0-\x1f\x7f]{0,99}", name):
        raise ValueError("give a name for a folder: up to 100 characters, no slashes, and no dot first")
    return name


def _check_ip_address(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("give an IP address of this machine, such as 127.0.0.1 or 10.0.0.5") from None
    return text


FileName = Annotated[str, AfterValidator(_check_file_name)]
IpAddress = Annotated[str, AfterValidator(_check_ip_address)]


class InvalidSettings(ConfigError):  # noqa: N818 - it is the settings that are wrong
    """Some settings are wrong.

    rest: a config of the others; None where they make none. What contradicts itself is in it.
    """

    def __init__(self, message: str, rest: Config | None) -> None:
        super().__init__(message)
        self.rest = rest


class Section(BaseModel):
    """One section of the tree: unknown keys are refused, values are not coerced across kinds."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, value: Any) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        return {} if value is None else value


class RunConfig(Section):
    name: FileName = "run"
    """A name for the run; its directory is `run.root/NAME-TIMESTAMP` unless `run.dir` is given."""
    root: str = "runs"
    """Folder in which run directories are made."""
    dir: str | None = None
    """The run directory itself. It must not hold another run."""
    seed: int = Field(0, ge=0)
    """Seeds the order of the prompts and every sampled token."""
    resume: Literal["never", "auto"] = "never"
    """`auto`: where `run.dir` holds an interrupted run, go on with it (`asyncrl-launch --resume` in a config,
    for jobs that a cluster starts again)."""
    accept_changed_files: bool = False
    """Go on with an interrupted run although the Python files behind its reward functions or its objective
    have changed since its start."""
    record: bool = False
    """Keep every batch that was trained on in `ledger.db`, for `asyncrl replay`. Otherwise a batch is
    forgotten once all checkpoints are later. `inline` runs are always recorded."""
    mode: Literal["async", "inline"] = "async"
    """`async`: several processes. `inline`: the same components in one process, on a deterministic
    schedule."""
    role_host: str = "local"
    """What starts the processes of an `async` run. `local`: this machine. Or your own, called with the run's
    `RunDir`: `package.module:name` or `path/file.py:name` (`asyncrl.cluster.hosts.base`)."""
    steps: int = Field(100, ge=1)
    """Training steps (weight versions published after the initial one)."""
    gpu_hours: float | None = Field(None, gt=0)
    """GPU hours that the run may spend: all GPUs that it holds, times wall-clock time. It ends, with a
    checkpoint and its learning-rate schedule complete, before another step would overspend them. null is no
    limit."""
    start_s: float = Field(600.0, gt=0)
    """Longest start, until a first engine has taken the trainer's first weights. A process that is started
    again and has not come up after as long is replaced."""
    stall_s: float = Field(300.0, gt=0)
    """When, after the start, nothing that the next step needs has moved for this long (no micro-batch
    computed, no token generated, no response scored), the run says who waits for whom, and does as `on_stall`
    says. It does so too when all that moves, but no step has ended for six times as long: something repeats
    without end."""
    on_stall: Literal["restart", "end"] = "restart"
    """What to do then. `restart`: replace the process that holds the run up; when that does not help, end the
    run. `end`: end it at once."""
    hang_s: float = Field(60.0, ge=2)
    """A process that shows no sign of life for this long is taken for hung, killed and replaced."""
    max_restarts: int = Field(5, ge=0)
    """How often the coordinator, and the trainer (all its ranks together), are each started again after
    deaths within an hour, at once at first and then with growing delays, before the run ends."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Stop the run when more than this share of the finished groups has failed (judged from 20 groups on)."""

    @property
    def longest_step_s(self) -> float:
        """What a step may take, however much moves meanwhile."""
        return STEP_STALLS * self.stall_s

    @property
    def records(self) -> bool:
        """Whether every batch is kept."""
        return self.record or self.mode == "inline"


class ModelConfig(Section):
    path: str
    """A folder with a Hugging Face decoder-only model and its tokenizer, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in, in engine and trainer. The optimizer keeps float32 weights either way."""
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel of the trainer. `varlen`: torch's kernel for sequences of any length, without padding
    and masks (on a CPU a slow reference of it). `auto`: `varlen` on a GPU, if it can compute what the model
    wants in `model.dtype`, else `sdpa`, and `eager` for models that cap their attention's scores (Gemma 2).
    The embedded engine uses `sdpa` where the model has it, and caps where the model does."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class DataConfig(Section):
    path: str
    """A `.jsonl` or `.parquet` file, a folder saved by `datasets`, or `hub:OWNER/NAME`."""
    split: str = "train"
    """Split, for datasets that have several."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of messages (`role`, `content`)."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message; makes string prompts conversations."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the chat template, such as `{enable_thinking: false}`. A row may have its own in a
    column of this name, and `tools` (JSON schemas, as a list or as JSON text)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are bad rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be used: refuse the run, or report and leave them out."""
    held_out_rows: int = Field(0, ge=0)
    """So many usable rows at the end of the dataset are never trained on: `asyncrl eval` scores models on
    them."""
    shuffle: bool = True
    """Shuffle anew in every epoch, by `run.seed`."""
    drop_last: bool = False
    """Leave out of each epoch the rows at its end that do not fill another batch of `trainer.batch_groups`;
    with `shuffle` these are others in every epoch."""


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
    urls: list[str] = []
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
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
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


class RewardPartConfig(Section):
    """What every part of the reward has: how it enters the sum, in this order."""

    weight: float = 1.0
    """Its weight in the sum."""
    name: str | None = None
    """Name in the metrics; by default the function's own, or the last folder of the model's path."""
    standardise: bool = False
    """Subtract the mean and divide by the standard deviation of this part over the batches so far."""
    cap: float | None = None
    """Clip of Gao et al. 2024: min(value - cap, 0), so that nothing is won above the cap."""
    clip: tuple[float, float] | None = Field(None, strict=False)
    """Lowest and highest value that enters the sum."""
    gate: str | None = None
    """Name of a reward function: where that gave 0 or less, this part adds nothing (P-GRPO)."""


class RewardFunctionConfig(RewardPartConfig):
    function: Annotated[str, BeforeValidator(_spec_of_function)]
    """`package.module:function` or `path/file.py:function`; from Python also a function that is defined in a
    file."""

    @property
    def label(self) -> str:
        """Its name in the metrics, and wherever the config refers to it."""
        return self.name or self.function.rpartition(":")[2]


class RewardModelConfig(RewardPartConfig):
    path: str
    """A folder with a Hugging Face sequence-classification model of one output and its tokenizer, or a hub
    name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the model computes in; its head always computes in float32."""
    sigmoid: bool = False
    """Map the score to 0..1, before anything else: the chance to beat a response of score 0."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens scored in one forward pass, padding included; a longer pair goes alone."""
    timeout_s: float = Field(120.0, gt=0)
    """A forward pass that takes longer is taken for hung, and the process replaced."""
    max_restarts: int = Field(5, ge=0)
    """How often its process is started again after deaths within an hour, before the run ends."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; on a GPU of its own where there are several."""
    share_gpu_with: str | None = None
    """Share the GPU of this process instead: `trainer`, `rollout-0`, ..."""
    gpu_memory: float = Field(1.0, gt=0, le=1)
    """Share of its GPU's memory that it may take."""
    threads: int = Field(1, ge=1)
    """CPU threads that it computes with."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @property
    def label(self) -> str:
        """Its name in the metrics, and wherever the config refers to it."""
        return self.name or Path(self.path).name


class RewardRouteConfig(Section):
    column: str | None = None
    """Column of the dataset that says what scores a row, with dots into nested ones: `reward_model.style`.
    Null: everything scores every row."""
    parts: dict[str, list[str]] = {}
    """For each value of the column, names of functions and models. A part that is named nowhere scores every
    row."""


class OverlongConfig(Section):
    buffer_tokens: int = Field(0, ge=0)
    """Soft overlong punishment (DAPO): over the last so many tokens before `rollout.max_new_tokens` the part
    `overlong` falls from 0 to -1. 0 is off."""
    weight: float = Field(1.0, gt=0)
    """Its weight in the sum."""


class FormatConfig(Section):
    pattern: str | None = None
    """Regular expression that a whole response has to match (`.` matches line ends too): the part `format` is
    0 where it does, else -1. Null is off."""
    weight: float = Field(1.0, gt=0)
    """Its weight in the sum."""


class RewardConfig(Section):
    functions: list[RewardFunctionConfig] = []
    """Reward functions; the reward is the weighted sum of all parts."""
    models: list[RewardModelConfig] = []
    """Reward models, each in a process of its own; a response is scored as soon as it is finished."""
    route: RewardRouteConfig = RewardRouteConfig()
    overlong: OverlongConfig = OverlongConfig()
    format: FormatConfig = FormatConfig()
    standardise_decay: float = Field(1.0, gt=0, le=1)
    """What the statistics behind `standardise` keep of their weight at each training step: 1 counts the whole
    run alike, 0.99 mostly the last hundred steps."""
    workers: int = Field(1, ge=1)
    """Processes per rollout worker in which the functions run; those that are `async def` run in as many of
    their own."""
    concurrency: int = Field(32, ge=1)
    """Groups that such a process of `async def` functions scores side by side."""
    timeout_s: float = Field(30.0, gt=0)
    """Wall-clock limit of one call of a function, from its start (waiting in the queue does not count)."""
    retries: int = Field(1, ge=0)
    """Further tries after an exception, a time-out or a lost process, before the attempt at the group
    fails."""
    patience_s: float = Field(120.0, ge=0)
    """A function that cannot reach what it asks over a network (a judge that is away or overloaded) is called
    again, with growing pauses, for this long before that counts as a failure; `run.stall_s` stands still
    meanwhile."""
    strip_special_tokens: bool = False
    """Leave every special token out of the text that rewards read, not only those that end a response or
    pad."""

    @property
    def part_names(self) -> list[str]:
        """Names of all parts, in the order of the sum."""
        shaping = {"overlong": self.overlong.buffer_tokens > 0, "format": self.format.pattern is not None}
        return [part.label for part in (*self.functions, *self.models)] + [
            n for n, on in shaping.items() if on
        ]


class StalenessConfig(Section):
    max_staleness: int = Field(4, ge=0)
    """η: no token older than this many versions contributes to a gradient. 0 is synchronous, 1 one step
    off."""
    on_stale: Literal["wait", "mask", "drop"] = "wait"
    """A group that would break the bound is waited for in time, loses its old tokens, or is dropped and its
    prompt sampled again."""
    fixed_lag: int | None = Field(None, ge=0)
    """For experiments: hold groups until all their tokens are exactly this many versions old (in the first
    steps: of version 0), however fast anything is. Each step waits until its version's weights have sampled
    their share, so sampling and training do not overlap; null lets them."""

    @property
    def bound(self) -> int:
        """Largest staleness of a trained token."""
        return self.max_staleness if self.fixed_lag is None else self.fixed_lag


class ObjectiveConfig(Section):
    """What null means everywhere here: the objective's own default, which its signature declares."""

    advantage: Annotated[str, _named((*GROUP_ADVANTAGES, *TOKEN_ADVANTAGES))] = "grpo"
    """Advantage estimator (docs/objectives.md), or your own: `package.module:function` or
    `path/file.py:function`."""
    policy_loss: Annotated[str, _named(POLICY_LOSSES)] = "decoupled_ppo"
    """Policy objective (docs/objectives.md), or your own: `package.module:function` or
    `path/file.py:function`."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] | None = None
    """How the tokens' losses become one number: the mean over tokens; the mean over sequences of each one's
    mean; the sum over `rollout.max_new_tokens` for each sequence."""
    proximal: Literal["recompute", "loglinear", "ewma", "behavior"] = "recompute"
    """Where the centre of the clip comes from: the policy at the step's start, by a forward pass; between the
    behaviour policy and the present one, without a pass (A-3PO); an average of past weights (PPO-EWMA); the
    behaviour policy itself."""
    ewma_decay: float = Field(8 / 9, gt=0, lt=1)
    """`proximal: ewma`: what the average keeps of itself at each update."""
    step_size: Literal["constant", "vcpo"] = "constant"
    """`vcpo` multiplies the learning rate by sqrt(ESS / B), over the batch's trajectories: smaller steps on
    batches of which little counts."""
    settings: dict[str, Any] = {}
    """Keyword arguments of your own objective or advantage."""
    clip_eps_low: float | None = Field(None, gt=0, lt=1)
    """PPO's ratio is clipped below at 1 - this."""
    clip_eps_high: float | None = Field(None, gt=0)
    """PPO's ratio is clipped above at 1 + this."""
    dual_clip: float | None = Field(None, gt=1, allow_inf_nan=True)
    """Tokens with a negative advantage A lose at most this times |A| (dual clip); .inf is off."""
    behavior_cap: float | None = Field(None, gt=0, allow_inf_nan=True)
    """Upper bound of the behaviour correction pi_prox / mu (truncated importance sampling); .inf leaves it
    whole."""
    ratio_low: float | None = Field(None, ge=0)
    """Lower bound of the importance ratio: below it the ratio is clipped or its token left out, as the
    objective does."""
    ratio_high: float | None = Field(None, gt=0, allow_inf_nan=True)
    """Upper bound of the importance ratio."""
    max_second_moment: float | None = Field(None, ge=0)
    """`m2po` leaves out tokens until the mean of (log pi_prox / mu)² is at most this."""
    prob_delta: float | None = Field(None, gt=0, le=1)
    """`dppo` leaves out tokens whose probability has moved further than this."""
    tau_pos: float | None = Field(None, gt=0)
    """`sapo`: sharpness of the gate for tokens with a positive advantage."""
    tau_neg: float | None = Field(None, gt=0)
    """`sapo`: sharpness of the gate for other tokens."""
    max_reward: float | None = None
    """`ngrpo`: the greatest reward that there is."""
    success_above: float | None = None
    """`nsr`: a response with a greater reward than this succeeded."""
    positive_weight: float | None = Field(None, ge=0)
    """`nsr`: advantage of a success; that of a failure is -1."""
    gamma: float | None = Field(None, gt=0, le=1)
    """`gae`, `vtrace`: discount of a token's later rewards."""
    lam: float | None = Field(None, ge=0, le=1)
    """`gae`, `vtrace`: how far ahead rewards are taken as they came (1), rather than from the critic (0)."""
    rho_bar: float | None = Field(None, gt=0, allow_inf_nan=True)
    """`vtrace`: upper bound of a token's importance ratio in its own error; .inf leaves it whole."""
    c_bar: float | None = Field(None, gt=0, allow_inf_nan=True)
    """`vtrace`: upper bound of the ratio by which later errors reach a token."""
    whiten: bool = False
    """Advantages of tokens (`gae`, `vtrace`) less their mean, over their deviation, in each batch."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    filter_constant_groups: bool = False
    """Drop groups whose rewards are all equal (they carry no gradient); their places are sampled again."""

    def settings_of(self, name: str) -> dict[str, Any]:
        """What is set, other than by default, of the settings of the policy loss or advantage `name`."""
        if is_own(name):
            return self.settings
        entry = {**POLICY_LOSSES, **GROUP_ADVANTAGES, **TOKEN_ADVANTAGES}[name]
        return {key: value for key in entry.settings if (value := getattr(self, key)) is not None}


class CriticConfig(Section):
    path: str | None = None
    """A folder with a Hugging Face decoder of the policy's vocabulary, or a hub name: the critic's backbone
    at the start. null takes another copy of `model.path`."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate of the critic; it has the schedule of `trainer.lr`."""
    value_clip: float | None = Field(0.5, gt=0)
    """An update gains nothing from moving a value further than this from what it was; null is off."""
    warmup_steps: int = Field(0, ge=0)
    """Training steps at the start in which only the critic learns."""
    updates_per_policy_step: int = Field(1, ge=1)
    """Passes of the critic over each batch, of `trainer.mini_batches` updates each."""


class ReferenceConfig(Section):
    path: str | None = None
    """A folder with a Hugging Face decoder of the policy's vocabulary, or a hub name. null takes
    `model.path`: the initial policy."""
    kl_coef: float = Field(0.001, gt=0)
    """Weight of the KL divergence of the policy from the reference."""
    where: Literal["reward", "loss"] = "loss"
    """`reward`: each token's k1 is taken off its reward. `loss`: the estimate is added to the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Of the KL in the loss (docs/objectives.md); in the reward it is k1 always."""
    offload: bool = False
    """Keep the reference in host memory while it does not compute."""


class PacedTrainerConfig(Section):
    step_s: float = Field(1.0, ge=0)
    """Time of a training step."""


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What the ranks share out among each other: 0 nothing, 1 the optimizer's state, 2 the gradients too, 3
    the weights too. 0 and 1 keep all gradients on every rank (4 bytes a parameter) and sum them over the
    ranks once a mini-batch; 2 and 3 once a micro-batch, while the backward pass goes on."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    offload_parameters: bool = False
    """Keep the weights in host memory while they are not computed with (zero_stage 3)."""
    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the ranks sum their gradients (zero_stage 1 to 3). float32: how many ranks there are changes
    no gradient. bfloat16 rounds the sums, for half the traffic: where GPUs have no NVLink between them."""
    zero: dict[str, Any] = {}
    """Further settings of DeepSpeed's `zero_optimization`, by DeepSpeed's own names."""


class TrainerConfig(Section):
    backend: Literal["torch", "deepspeed", "paced"] = "torch"
    """`torch`: one rank. `deepspeed`: any number, by ZeRO. `paced`: waits as long as a GPU would take instead
    of computing (benchmarks)."""
    ranks: int = Field(1, ge=1)
    """Trainer processes, one a GPU; on the CPU each computes with `trainer.threads`."""
    batch_groups: int = Field(16, ge=1)
    """Groups in a training step (B)."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer updates in a training step."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens in one forward and backward pass; a longer sequence goes alone."""
    share_prompts: bool = True
    """Compute a group's prompt once for all its responses, where the model's attention allows it. Same
    gradient, less work."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to `lr_min_share` at the last step."""
    lr_min_share: float = Field(0.0, ge=0, le=1)
    """Share of `lr` at the end of a linear or cosine schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Training steps over which the learning rate rises linearly."""
    betas: tuple[Share, Share] = Field((0.9, 0.95), strict=False)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    fused_kernels: Literal["auto", "never"] = "auto"
    """Fused norms, MLPs and rotary embeddings. `auto`: those of liger-kernel, on a GPU, if it is installed
    and the model is of a family that they are known to be right for."""
    logit_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at the same time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs."""
    threads: int = Field(1, ge=1)
    """CPU threads of the trainer."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    paced: PacedTrainerConfig = PacedTrainerConfig()


class WeightsConfig(Section):
    transport: str = "shm"
    """How weight versions get from the trainer to the engines. `shm`: through this host's shared memory. Or
    your own, `package.module:name` or `path/file.py:name` (`asyncrl.weights.transport`)."""
    ack_timeout_s: float = Field(120.0, gt=0)
    """Longest wait for an engine to take a weight version, before it counts as a stall (`run.on_stall`)."""
    canary: bool = True
    """After each update, compare every tensor that a vLLM engine holds with what was published, and have
    engines and servers score a text that the trainer scores too. The run stops when they differ."""


class PlacementConfig(Section):
    colocate: Literal["auto", "never", "always"] = "auto"
    """Whether trainer ranks and engines compute on the same GPUs. `never`: each has GPUs of its own.
    `always`: ranks and engines are both laid out from GPU 0 on, and run at the same time. `auto`: they share
    where there is but one GPU, and only there."""
    pin_cores: Literal["auto", "never"] = "never"
    """`auto`: where the cores are enough for all their threads, engines, trainer ranks and reward models that
    compute on the CPU stay on cores of their own. Runs that share a machine would choose the same ones; start
    each on a set of its own then (`taskset`)."""


class NetworkConfig(Section):
    bind: IpAddress = "127.0.0.1"
    """IP address on which the coordinator listens. Any other than a loopback address lets roles on other
    hosts in; every connection is encrypted, and open to those alone who have the keys of the run."""
    advertise: str | None = None
    """Name or address by which other hosts reach `network.bind`; needed where that is a wildcard (0.0.0.0,
    ::). null takes the address itself."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=0)
    """Save everything that the run needs to go on every so many steps, and at its end; 0: at the end only.
    null: by the clock, the more seldom the longer a checkpoint keeps the training waiting, at most once a
    minute (docs/operations.md); with `run.mode=inline`, which no clock may change, at the end only."""
    keep_last: int = Field(2, ge=1)
    """So many of the latest checkpoints are kept."""
    keep_best: int = Field(0, ge=0)
    """So many more, of those with the highest mean reward of their step's batch."""


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    staleness: StalenessConfig = StalenessConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    trainer: TrainerConfig = TrainerConfig()
    critic: CriticConfig | None = None
    """The critic, for the advantages `gae` and `vtrace`; null is none."""
    reference: ReferenceConfig | None = None
    """A frozen policy to stay close to; null is none."""
    weights: WeightsConfig = WeightsConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    network: NetworkConfig = NetworkConfig()

    @property
    def epoch_multiple(self) -> int:
        """An epoch has a multiple of so many rows."""
        return self.trainer.batch_groups if self.data.drop_last else 1

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Self:
        if info.context != _ANY_RATE and (problems := list(_impossible(self))):
            raise ValueError("\n".join(problems))
        return self


def _impossible(c: Config) -> Iterator[str]:
    """Combinations of valid values that cannot work, each with its reason and remedy."""
    if c.trainer.mini_batches > c.trainer.batch_groups:
        yield (
            f"trainer.mini_batches={c.trainer.mini_batches} cannot split trainer.batch_groups="
            f"{c.trainer.batch_groups}: a mini-batch has at least one group; lower mini_batches"
        )
    if c.rollout.group_size == 1 and c.objective.advantage in COMPARE_WITHIN_GROUPS:
        yield (
            f"rollout.group_size=1 leaves nothing to compare: `{c.objective.advantage}` advantages of a "
            "group of one are all 0; use rollout.group_size >= 2"
        )
    if c.rollout.temperature == 0 and c.rollout.group_size > 1:
        yield (
            "rollout.temperature=0 samples the same response for the whole group, so nothing can be learnt "
            "from it; use a temperature above 0"
        )
    if c.run.resume == "auto" and c.run.dir is None:
        yield (
            "run.resume=auto goes on with the run in run.dir, and none is named: every start would begin "
            "another one; name it, such as run.dir=runs/mine"
        )
    yield from _impossible_staleness(c.staleness)
    yield from _impossible_objective(c.objective)
    yield from _impossible_sampling(c)
    yield from _impossible_filter(c)
    yield from _impossible_critic(c)
    yield from _impossible_rewards(c)
    yield from _impossible_backends(c)
    if c.rollout.engine == "http":
        yield from impossible_servers(c)
    yield from _impossible_ranks(c)
    yield from _impossible_network(c.network)


def _impossible_sampling(c: Config) -> Iterator[str]:
    """Ways of sampling that an objective, or an engine, does not stand."""
    cut = {"top_p": c.rollout.top_p if c.rollout.top_p < 1 else None, "top_k": c.rollout.top_k or None}
    cuts = " and ".join(f"rollout.{key}={value}" for key, value in cut.items() if value is not None)
    whole = {"objective.policy_loss": c.objective.policy_loss, "objective.step_size": c.objective.step_size}
    for key, value in whole.items():
        if cuts and value in ("topr", "vcpo"):
            yield (
                f"{key}={value} weighs whole responses by their ratios, and {cuts} renormalises what is "
                "sampled from but not the trainer's policy: the ratios of long responses would vanish even "
                "on policy; use rollout.top_p=1 and rollout.top_k=0"
            )
    if c.rollout.engine in ("vllm", "http") and c.rollout.temperature > VLLM_MAX_TEMPERATURE:
        yield (
            f"rollout.temperature={c.rollout.temperature:g}: vLLM takes temperatures up to "
            f"{VLLM_MAX_TEMPERATURE:g}; use a lower one"
        )


def _impossible_filter(c: Config) -> Iterator[str]:
    """`filter_constant_groups` where groups of equal rewards are what is learnt from."""
    if not c.objective.filter_constant_groups:
        return
    key, advantage = "objective.filter_constant_groups=true", c.objective.advantage
    if c.rollout.group_size == 1:
        yield f"{key}: every group of one (rollout.group_size=1) has equal rewards and would be dropped"
    if not is_own(advantage) and advantage not in COMPARE_WITHIN_GROUPS:
        yield (
            f"{key}: objective.advantage={advantage} learns from groups of equal rewards, too, and they "
            "would be dropped; leave the filter out"
        )
    if c.reference is not None and c.reference.where == "reward":
        yield (
            f"{key}: with reference.where=reward equal rewards differ by their KL, and it is not known yet "
            "when groups are filtered; use reference.where=loss, or leave the filter out"
        )


def _impossible_network(network: NetworkConfig) -> Iterator[str]:
    if ipaddress.ip_address(network.bind).is_unspecified and network.advertise is None:
        yield (
            f"network.bind={network.bind} listens on every address of this machine, and other hosts must be "
            "told one of them; set network.advertise to a name or address that they reach"
        )


def _impossible_ranks(c: Config) -> Iterator[str]:
    trainer = c.trainer
    if trainer.ranks > 1 and trainer.backend != "deepspeed":
        yield (
            f"trainer.ranks={trainer.ranks}: trainer.backend={trainer.backend} has one rank; use "
            "trainer.backend=deepspeed, or trainer.ranks=1"
        )
    if trainer.deepspeed.offload_parameters and trainer.deepspeed.zero_stage != 3:
        yield (
            f"trainer.deepspeed.offload_parameters needs trainer.deepspeed.zero_stage=3, not "
            f"{trainer.deepspeed.zero_stage}: the lower stages keep whole weights on every rank"
        )
    if trainer.backend == "deepspeed" and c.run.mode == "inline":
        yield (
            "run.mode=inline computes in one process, and trainer.backend=deepspeed has ranks of its own; "
            "use trainer.backend=torch, or run.mode=async"
        )


def _impossible_staleness(staleness: StalenessConfig) -> Iterator[str]:
    lag = staleness.fixed_lag
    if lag is not None and lag > staleness.max_staleness:
        yield (
            f"staleness.fixed_lag={lag} makes every token too old for staleness.max_staleness="
            f"{staleness.max_staleness}; use staleness.max_staleness={lag}, or a smaller lag"
        )
    if lag is not None and staleness.on_stale != "wait":
        yield (
            f"staleness.on_stale={staleness.on_stale} has nothing to decide with staleness.fixed_lag={lag}, "
            "under which no token is ever too old; use staleness.on_stale=wait"
        )


def _impossible_critic(c: Config) -> Iterator[str]:
    advantage, needed = c.objective.advantage, ", ".join(TOKEN_ADVANTAGES)
    if advantage in TOKEN_ADVANTAGES and c.critic is None:
        yield (
            f"objective.advantage={advantage} takes its values from a critic, and there is none; add a "
            "section `critic:` (it may be empty: `critic: {}`), or use objective.advantage=grpo"
        )
    if c.critic is not None and advantage not in TOKEN_ADVANTAGES:
        yield (
            f"critic: objective.advantage={advantage} asks no critic; leave the section out, or use "
            f"objective.advantage={needed.replace(', ', ' or ')}"
        )
    if c.objective.proximal == "ewma" and c.trainer.backend == "deepspeed":
        yield (
            "objective.proximal=ewma keeps a second copy of whole weights, which trainer.backend=deepspeed "
            "shares out; use trainer.backend=torch, or objective.proximal=recompute"
        )
    if c.objective.whiten and advantage not in TOKEN_ADVANTAGES:
        yield f"objective.whiten is for {needed}, and objective.advantage={advantage}; leave it out"
    for key, section in (("critic", c.critic), ("reference", c.reference)):
        if section is not None and c.trainer.backend == "paced":
            yield f"{key}: trainer.backend=paced computes nothing; leave the section out"


def _impossible_objective(objective: ObjectiveConfig) -> Iterator[str]:
    """Settings that neither the policy loss nor the advantage has."""
    advantages = {**GROUP_ADVANTAGES, **TOKEN_ADVANTAGES}
    chosen = {
        f"objective.policy_loss={objective.policy_loss}": POLICY_LOSSES.get(objective.policy_loss),
        f"objective.advantage={objective.advantage}": advantages.get(objective.advantage),
    }
    has = {name: entry.settings if entry else ("settings",) for name, entry in chosen.items()}
    entries = {**POLICY_LOSSES, **GROUP_ADVANTAGES, **TOKEN_ADVANTAGES}
    for key in dict.fromkeys(key for entry in entries.values() for key in entry.settings):
        value = getattr(objective, key)
        if value is None or any(key in settings for settings in has.values()):
            continue
        others = ", ".join(name for name, entry in entries.items() if key in entry.settings)
        having = "; ".join(f"{name} has {', '.join(keys) or 'none'}" for name, keys in has.items())
        yield f"objective.{key}={value} is a setting of {others}, and not of what is chosen: {having}"
    low, high = objective.ratio_low, objective.ratio_high
    if low is not None and high is not None and low > high:
        yield f"objective.ratio_low={low} is above objective.ratio_high={high}: no ratio lies between them"
    loss = POLICY_LOSSES.get(objective.policy_loss)
    if objective.proximal != "recompute" and loss is not None and not loss.has_proximal:
        having = ", ".join(name for name, entry in POLICY_LOSSES.items() if entry.has_proximal)
        yield (
            f"objective.proximal={objective.proximal}: objective.policy_loss={objective.policy_loss} has no "
            f"proximal policy; those that have: {having}"
        )
    if objective.proximal != "ewma" and objective.ewma_decay != ObjectiveConfig().ewma_decay:
        yield (
            f"objective.ewma_decay={objective.ewma_decay} is for objective.proximal=ewma, and it is "
            f"{objective.proximal}; leave it out"
        )
    if objective.settings and all(chosen.values()):
        yield (
            f"objective.settings={objective.settings} are for an objective or advantage of your own "
            f"(package.module:function), and {' and '.join(chosen)} are not; set their own keys"
        )


def _impossible_rewards(c: Config) -> Iterator[str]:
    reward = c.reward
    scoring = {f"reward.functions.{i}": f for i, f in enumerate(reward.functions)}
    scoring |= {f"reward.models.{i}": m for i, m in enumerate(reward.models)}
    if not scoring:
        yield "reward: nothing scores a response; give reward.functions or reward.models"
    elif all(part.weight == 0 for part in scoring.values()):
        yield "reward: every weight is 0, so every reward would be 0; give a function or model a weight"
    for name, count in Counter(reward.part_names).items():
        if count > 1:
            yield (
                f"reward has {count} parts called `{name}`, which the metrics could not tell apart; give "
                "each a `name` of its own"
            )
    functions = {f.label for f in reward.functions}
    for key, part in scoring.items():
        if part.clip is not None and part.clip[0] >= part.clip[1]:
            yield f"{key}.clip={list(part.clip)}: write the lower bound first, then a higher one"
        if part.gate is not None and part.gate not in functions - {part.label}:
            yield f"{key}.gate={part.gate}: no other reward function of that name; {_there_are(functions)}"
    yield from _impossible_routes(reward.route, {part.label for part in scoring.values()})
    for i, model in enumerate(reward.models):
        roles = {"trainer", *(f"rollout-{n}" for n in range(c.rollout.workers))}
        if model.share_gpu_with is not None and model.share_gpu_with not in roles:
            yield (
                f"reward.models.{i}.share_gpu_with={model.share_gpu_with}: no such process; "
                f"{_there_are(roles)}"
            )
    if reward.overlong.buffer_tokens > c.rollout.max_new_tokens:
        yield (
            f"reward.overlong.buffer_tokens={reward.overlong.buffer_tokens} is longer than any response "
            f"(rollout.max_new_tokens={c.rollout.max_new_tokens})"
        )
    if reward.format.pattern is not None:
        try:
            re.compile(reward.format.pattern)
        except re.error as error:
            yield f"reward.format.pattern={reward.format.pattern!r} is no regular expression: {error}"


def _impossible_routes(route: RewardRouteConfig, names: set[str]) -> Iterator[str]:
    if route.parts and route.column is None:
        yield "reward.route.parts needs reward.route.column: the column whose value chooses among them"
    if route.column is not None and not route.parts:
        yield f"reward.route.column={route.column} needs reward.route.parts: what scores which of its values"
    for value, parts in route.parts.items():
        for name in parts:
            if name not in names:
                known = _there_are(names)
                yield f"reward.route.parts.{value}: no function or model is called `{name}`; {known}"


def _there_are(names: Iterable[str]) -> str:
    return f"there are {', '.join(f'`{name}`' for name in sorted(names)) or 'none'}"


def _impossible_backends(c: Config) -> Iterator[str]:
    paced = (c.rollout.engine == "paced", c.trainer.backend == "paced")
    if c.run.mode == "inline" and c.rollout.engine in ("vllm", "http"):
        yield (
            "run.mode=inline steps the embedded engine by hand, and vLLM schedules by itself; use "
            "rollout.engine=torch, or run.mode=async"
        )
    if c.rollout.tensor_parallel_size > 1 and c.rollout.engine != "vllm":
        yield (
            f"rollout.tensor_parallel_size={c.rollout.tensor_parallel_size}: only rollout.engine=vllm splits "
            f"a model; use it instead of rollout.engine={c.rollout.engine}, or rollout.tensor_parallel_size=1"
        )
    if c.rollout.kv_on_update == "resubmit" and c.rollout.engine != "vllm":
        yield (
            f"rollout.kv_on_update=resubmit is for rollout.engine=vllm; rollout.engine={c.rollout.engine} "
            "need not take requests back to compute them anew: use rollout.kv_on_update=recompute, which "
            "samples from the same distribution"
        )
    if c.run.mode == "inline" and any(paced):
        yield "run.mode=inline computes and cannot pace an engine or trainer; use run.mode=async"
    if c.run.mode == "inline" and c.rollout.workers > 1:
        yield f"run.mode=inline has one engine; use rollout.workers=1, not {c.rollout.workers}"
    if paced == (False, True):
        yield (
            f"trainer.backend=paced trains no model that rollout.engine={c.rollout.engine} could take "
            "weights from; use rollout.engine=paced with it"
        )
    if c.model.attn_implementation == "flash_attention_2" and c.model.dtype == "float32":
        yield (
            "model.attn_implementation=flash_attention_2 computes in 16 bits only; use model.dtype=bfloat16, "
            "or model.attn_implementation=sdpa"
        )
    if c.model.attn_implementation == "flash_attention_2" and c.trainer.device == "cpu":
        yield (
            "model.attn_implementation=flash_attention_2 needs a GPU, but trainer.device=cpu; "
            "use model.attn_implementation=sdpa"
        )


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or the preset of that name where there is no such file (`asyncrl.config.presets`),
    and apply `key.sub=value` overrides (values are YAML). Raises `ConfigError`."""
    found = presets.find(Path(path))
    return from_tree(yaml_tree.read(found), source=str(path), overrides=overrides)


def from_tree(tree: Mapping[str, Any], source: str = "config", overrides: Iterable[str] = ()) -> Config:
    """Build a `Config` from nested mappings and `key.sub=value` overrides. Raises `ConfigError` with one line
    per wrong
    key: where it was set (`source`, or the command line for overridden keys), its value, and what would be
    right."""
    tree = copy.deepcopy(dict(tree))
    overridden = [yaml_tree.override(tree, text) for text in overrides]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, valid_keys=list(keys()), source=source, overridden=overridden)
        raise InvalidSettings("\n".join(lines), _rest(tree, error)) from None


def _rest(tree: dict[str, Any], error: ValidationError) -> Config | None:
    """The settings without those that are wrong, which have their defaults; None where they have none."""
    places = dict.fromkeys(e["loc"] for e in error.errors(include_url=False) if e["loc"])
    for place in reversed(places):  # of a list, the last first
        section: Any = tree
        try:
            for key in place[:-1]:
                section = section[key]
            del section[place[-1]]
        except (KeyError, IndexError, TypeError):
            return None
    try:
        return Config.model_validate(tree, context=_ANY_RATE)
    except ValidationError:
        return None


def dump(config: Config, *, changed_only: bool = False) -> str:
    """The resolved config as YAML that `load` reads back. changed_only: without what has its default."""
    return yaml_tree.write(config.model_dump(mode="json", exclude_defaults=changed_only))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included; `*` stands for the number of a list's item."""
    for name, info in section.model_fields.items():
        yield prefix + name
        nested = section_of(info.annotation)
        if nested is not None:
            star = "*." if get_origin(info.annotation) is list else ""
            yield from keys(nested, f"{prefix}{name}.{star}")


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that a field's annotation names (directly, in an optional or in a list), if any."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
