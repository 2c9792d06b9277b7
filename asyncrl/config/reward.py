"""Settings of what scores a response."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from asyncrl.resolve import spec_of
from asyncrl.section import Section


def _spec_of_function(function: Any) -> Any:
    """Names of files and modules stay; what is no function either is refused by its type."""
    return spec_of(function) if callable(function) else function


class PartConfig(Section):
    """How a part of the reward enters the sum."""

    weight: float = 1.0
    """Its weight in the sum."""
    standardise: bool | Literal["group"] = False
    """Subtract the mean and divide by the standard deviation of this part over the batches so far, or over
    each `group`."""
    cap: float | None = None
    """Clip of Gao et al. 2024: min(value - cap, 0), so that nothing is won above the cap."""
    clip: tuple[float, float] | None = Field(None, strict=False)
    """Lowest and highest value that enters the sum."""
    gate: str | None = None
    """Name of a reward function or judge (of an episode's part: of another): where that gave 0 or less, this
    part adds nothing (P-GRPO)."""


class RewardPartConfig(PartConfig):
    """What every part has that scores a response."""

    name: str | None = None
    """Name in the metrics; by default the function's own, or the last folder of the model's path."""
    sees: Literal["all", "answer"] | None = None
    """What it reads of a response; by default `reward.sees`."""


class RewardFunctionConfig(RewardPartConfig):
    function: Annotated[str, BeforeValidator(_spec_of_function)]
    """`package.module:function` or `path/file.py:function`; from Python also a function that is defined in a
    file."""
    arguments: dict[str, Any] = Field({})
    """Further keyword arguments, for the rows that have no column of the name: the same value for each of
    them."""

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


class CriterionConfig(Section):
    criterion: str
    """What a good response does (with a negative weight: what a bad one does), in words."""
    weight: float = 1.0
    """Its weight among the criteria."""


INITIAL = "initial"


class RewardJudgeConfig(RewardPartConfig):
    url: str | None = None
    """Base URL of a server with OpenAI's chat API, such as `http://HOST:8001/v1`."""
    model: str
    """Name of the model that the server is asked for. Without a `url`, `initial`: the run's own engine with
    the initial policy's weights, which stay as they are, in a process of the run."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's API key, where it asks for one."""
    asks: Literal["score", "criteria", "pairs", "group"] = "score"
    """What the judge is asked. `score`: a mark for each response. `criteria`: which criteria of the rubric a
    response meets. `pairs`: the better of two responses. `group`: marks for all responses of a group side by
    side. Every value is from 0 to 1 (with `criteria`, lower where negative weights apply)."""
    prompt: str | None = None
    """A file with the judge's prompt, as a Jinja template; by default the package's own for `asks`."""
    scale: tuple[float, float] = Field((0.0, 10.0), strict=False)
    """Worst and best mark that the judge is to give; they count as 0 and 1."""
    rubric: list[CriterionConfig] = Field([])
    """Criteria for every row: what `criteria` asks for, and advice to the others."""
    rubric_column: str | None = None
    """Column with a row's own criteria, in place of `rubric`: a list of texts or of mappings (`criterion` or
    `description`, with `weight` or `points`)."""
    reference_column: str | None = None
    """Column with a good response, shown to the judge. With `pairs` each response is compared with it, in
    place of the others of its group."""
    opponents: int | None = Field(None, ge=1)
    """With `pairs`: compare each response with so many that follow it in the group, in a circle; by default
    with all others."""
    swap: bool = True
    """Cancel what the order of responses does to the judge: `pairs` are asked about in both orders, and each
    vote on a `group` has its own."""
    votes: int = Field(1, ge=1)
    """Replies to each question, which are averaged."""
    reply_pattern: str | None = None
    """With `score`: a regular expression for judges that do not reply in JSON. The first group of its last
    match is the mark."""
    marks: dict[str, float] = Field({})
    """With `reply_pattern`: marks for words, such as `{'Yes': 10, 'No': 0}`; without them it matches a
    number."""
    body: dict[str, Any] = Field({})
    """Further keys of each request, in place of `temperature` (0 for a single vote, else 1) and `max_tokens`
    (2048); null leaves one out."""
    concurrency: int = Field(64, ge=1)
    """Requests at a time, of the whole run; those of one group are sent together."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Limit for the whole run; further groups wait, which no time limit counts."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """The same for tokens of prompts and replies, as the server reports them."""
    timeout_s: float = Field(60.0, gt=0)
    """A request without a whole reply for this long is taken for lost, as if the server were away."""
    cache: int = Field(10_000, ge=0)
    """Replies kept by each process, to be used again for the same question; 0 is off."""
    prices: tuple[float, float] = Field((0.0, 0.0), strict=False)
    """Prices of a million tokens of prompts and of replies, for the metric of the cost."""

    @property
    def label(self) -> str:
        """Its name in the metrics, and wherever the config refers to it."""
        return self.name or Path(self.model).name

    @property
    def is_initial(self) -> bool:
        """Whether the run itself serves it."""
        return self.url is None

    @property
    def compares(self) -> bool:
        """Whether it is shown the responses of a group beside each other."""
        return self.asks == "group" or (self.asks == "pairs" and self.reference_column is None)

    @property
    def shown_responses(self) -> int | None:
        """How many responses a question holds at most; None for all of a group."""
        return None if self.asks == "group" else 2 if self.asks == "pairs" or self.reference_column else 1

    @property
    def most_reply_tokens(self) -> int:
        """Longest reply that is asked for."""
        return int(self.body.get("max_tokens") or 2048)

    @property
    def needed_columns(self) -> list[str]:
        """Columns that a row must have."""
        return [column for column in (self.rubric_column, self.reference_column) if column is not None]


class RewardRouteConfig(Section):
    column: str | None = None
    """Column of the dataset that says what scores a row, with dots into nested ones: `reward_model.style`.
    Null: everything scores every row."""
    parts: dict[str, list[str]] = Field({})
    """For each value of the column, names of functions, judges and models. A part that is named nowhere
    scores every row."""


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


class LikelihoodConfig(Section):
    column: str = "answer"
    """Column with the reference answer."""
    form: Literal["mean", "product"] = "mean"
    """`mean`: the mean probability of its tokens, less that without the response (RLPR). `product`: its
    probability, by whose own gradient the answer is learnt, too (VeriFree)."""
    mark: str | None = None
    """The text after which a response gives its answer, such as `<answer>`; what follows it is replaced. By
    default what ends the model's thinking; an empty one lets the reference follow the whole response."""
    end: str = ""
    """What is written after the reference, and counts with it, such as `</answer>`."""
    weight: float = Field(1.0, gt=0)
    """Its weight in the sum of rewards."""


class RewardConfig(Section):
    functions: list[RewardFunctionConfig] = Field([])
    """Reward functions; the reward is the weighted sum of all parts."""
    models: list[RewardModelConfig] = Field([])
    """Reward models, each in a process of its own; a response is scored as soon as it is finished."""
    guests: int = Field(0, ge=0)
    """Most processes that may join the run for each reward model, to score beside its own, and leave it while
    it goes on (`asyncrl join --scores`, docs/cluster.md)."""
    judges: list[RewardJudgeConfig] = Field([])
    """Language models behind HTTP APIs; they are asked for a whole group when its responses are finished."""
    episode: dict[str, PartConfig] = Field({})
    """How the parts enter the sum that an episode names; those not listed here have the weight 1."""
    likelihood: LikelihoodConfig | None = None
    """The policy's own probability of a reference answer after its thinking, which the trainer computes; null
    is none."""
    route: RewardRouteConfig = RewardRouteConfig()
    overlong: OverlongConfig = OverlongConfig()
    format: FormatConfig = FormatConfig()
    standardise_decay: float = Field(1.0, gt=0, le=1)
    """What the statistics behind `standardise` keep of their weight at each training step: 1 counts the whole
    run alike, 0.99 mostly the last hundred steps."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes per rollout worker in which the functions run; judges, and functions that are `async def`,
    run in as many of their own. `auto` starts with one, and others while groups have waited a fourth of a
    second for a plain function (not in `inline` mode). A function that keeps a state, or loads a large model,
    wants a number."""
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
    sees: Literal["all", "answer"] = "all"
    """What rewards read of a response. `answer`: only what follows the thinking, which is nothing where that
    does not end; `format` reads all in any case."""
    thinking: tuple[str, str] | None = Field(None, strict=False)
    """What begins and what ends the thinking, for `sees: answer`; by default what the model's tokenizer or
    chat template marks it with."""
    strip_special_tokens: bool = False
    """Leave every special token out of the text that rewards read, not only those that end a response or
    pad."""

    @property
    def first_workers(self) -> int:
        """Processes to begin with."""
        return 1 if self.workers == "auto" else self.workers

    @property
    def called(self) -> list[RewardFunctionConfig | RewardJudgeConfig]:
        """What is called for a whole group, in a process."""
        return [*self.functions, *self.judges]

    @property
    def scoring(self) -> dict[str, RewardFunctionConfig | RewardJudgeConfig | RewardModelConfig]:
        """Everything but shaping, by its key, in the order of the sum."""
        kinds = {"functions": self.functions, "models": self.models, "judges": self.judges}
        return {f"reward.{kind}.{i}": part for kind, parts in kinds.items() for i, part in enumerate(parts)}

    @property
    def needs_thinking(self) -> bool:
        """Whether anything reads the answer alone."""
        return any(self.seen_by(part) == "answer" for part in self.scoring.values())

    def seen_by(self, part: RewardPartConfig) -> Literal["all", "answer"]:
        """What a part reads of a response."""
        return part.sees or self.sees

    @property
    def part_names(self) -> list[str]:
        """Names of all parts, in the order of the sum."""
        shaping = {"overlong": self.overlong.buffer_tokens > 0, "format": self.format.pattern is not None}
        return [part.label for part in self.scoring.values()] + [n for n, on in shaping.items() if on]
