"""All metrics of a run: what each is, and in what unit. `docs/metrics.md` is written from this table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Metric:
    """name: as in `metrics.jsonl`; a part in braces stands for any text. is_always: every line has it."""

    name: str
    unit: str
    meaning: str
    is_always: bool = False


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics that belong together. when: which runs have them, where not every run does."""

    title: str
    when: str
    metrics: Sequence[Metric]


# A group begins with `# title` and perhaps `> when`. A metric is its name (with a star where every line has
# it), its unit (a dash where there is none) and its meaning, two or more spaces apart.
_TABLE = """
# The step
step*                  steps      training steps done, counting from 1 and including this one
version*               versions   policy version that this step published
wall_s*                s          time from the start of the run to the end of the step
data/epoch             epochs     epoch of the dataset that prompts are taken from, counting from 0
data/epoch/{dataset}   epochs     the same of each dataset, where there are several (`data.mix`)
schedule/total_steps   steps      expected length of the run, for the learning-rate schedule
warnings               sentences  what this step's metrics show to be wrong, each reported once

# The curriculum
> Where the config has `data.curriculum`: of the rows, by the newest groups of each.
curriculum/measured_frac  share  rows whose pass rate is known
curriculum/solved_frac    share  of these, the rows that every response solved
curriculum/failed_frac    share  of these, the rows that no response solved

# Hints
> Where the config has `data.hints`.
hints/waiting_frac  share  rows with a hint that will be given it the next time they come

# Rewards
reward/mean*                 -  mean reward of the trained trajectories
reward/std*                  -  standard deviation of their rewards
reward/{part}/mean           -  mean of one part, as its function, model or episode gave it
reward/{part}/std            -  standard deviation of that part
reward/{part}/running_mean   -  mean over all batches so far, for a part with `standardise`
reward/{part}/running_std    -  standard deviation over all batches so far: the part is divided by it
reward_of/{dataset}/mean     -  mean reward of the responses handed in to prompts of one dataset (`data.mix`)
reward/histogram             -  rewards of the step's responses: counts between edges
reward_log/{name}            -  mean of what a reward function logged under this name
reward_time/{who}/wait_s     s  mean time that a group waited for the functions, or a response for a model
reward_time/{who}/score_s    s  mean time that scoring it took

# Judges
> Where the config has `reward.judges`: sums over the groups that were scored in the step.
judge/{judge}/requests           requests   requests to its server
judge/{judge}/cached             questions  questions that it had answered before
judge/{judge}/prompt_tokens      tokens     tokens of its prompts, as the server counts them
judge/{judge}/completion_tokens  tokens     tokens of its replies
judge/{judge}/cost               -          what they cost by `prices`, where they are given

# Responses
response_tokens/mean*         tokens  mean number of sampled tokens in a response, all its segments together
response_tokens/max           tokens  the same for the longest response
response_tokens/histogram     tokens  lengths of the step's responses: counts between edges
truncated_frac                share   responses that were cut off at `rollout.max_new_tokens`
segments/mean                 -       mean number of segments of a response, where some have several
segments/split_frac/{reason}  share   those split by the chat template (`template`) or the program (`history`)

# Episodes
> With `rollout.episode`.
episodes/computed_again_frac           share  of the prompts of later turns: computed before, and once more
episodes/computed_again_frac/{reason}  share  those not kept (`room`), or of older weights (`weights`)
episodes/guests_frac                   share  begun on machines that have joined (`rollout.episode_guests`)

# The gateway
> With `rollout.gateway`: shares of the requests that came over HTTP.
gateway/lost_frac            share  whose client went away before it was answered: not trained on
gateway/refused_frac         share  that were refused
gateway/other_sampling_frac  share  that asked for other sampling than the run's, and did not get it

# Staleness
staleness/mean*  versions  mean staleness of the trained tokens
staleness/max*   versions  largest staleness of a trained token
trained_tokens   tokens    sampled tokens that this step trained on
masked_tokens    tokens    sampled tokens of the batch that were masked: too stale, or `mask_truncated`

# Training
loss                  -        policy loss, mean over the mini-batches of the step
grad_norm             -        global norm of the gradient before clipping, mean over the updates
skipped_updates       updates  updates skipped because their gradient was not finite
impossible_tokens     tokens   trained tokens left out since the policy gives them no probability at all
lr                    -        learning rate of the policy in this step
clip_frac*            share    trained tokens whose gradient the objective set to 0
entropy*              nats     mean entropy of the policy at the trained tokens
entropy/coef          -        weight of the entropy bonus in this step (`objective.entropy_target`)
adv/mean              -        mean advantage of the trained tokens
adv/std               -        standard deviation of their advantages
adv/zero_groups_frac  share    groups without a learning signal: all their advantages are 0

# The critic
> Where the config has a section `critic`.
critic/loss                -        mean of (V - target)² / 2, without the clip; with `critic.bins`, too
critic/explained_variance  -        share of the targets' variance that the values explain before the update
critic/clip_frac           share    tokens whose value was clipped (`critic.value_clip`)
critic/grad_norm           -        global norm of its gradient before clipping, mean over the updates
critic/skipped_updates     updates  updates skipped because their gradient was not finite
critic/lr                  -        learning rate of the critic in this step
critic/target_mean         -        mean of the value targets

# The teacher
> Where the config has a section `teacher`.
teacher/kl  nats  KL divergence of the policy from the teacher, mean over the trained tokens

# The policy's probability of a reference answer
> Where the config has a section `reward.likelihood`.
likelihood/mean             -      what it gives a response, before its weight
likelihood/answer           -      mean or product of p of the answer's tokens, after the thinking
likelihood/direct           -      the same right after the prompt (`form: mean`)
likelihood/unanswered_frac  share  responses without the mark, and so without an answer

# Demonstrations
> Where the config has a section `sft`, in the steps that have some.
sft/loss    nats    mean of -log pi of their tokens, before the update
sft/tokens  tokens  of them, in this step

# Replay
> Where the config has a section `replay`. No other metric, nor the ledger, counts what is replayed.
replay/rows    rows      rows whose rare successes are remembered, this step's included
replay/groups  groups    groups of this step beside which those of an earlier one were learnt from once more
replay/tokens  tokens    of these successes, where there are any
replay/age     versions  mean staleness of these tokens, for which there is no bound
replay/ratio   -         mean of pi_theta / mu of these tokens, never clamped

# Training policy against sampling policy
> w is pi_prox / mu of a token, never clamped ([objectives](objectives.md#what-to-watch)).
ess*                         share  effective sample size of the behaviour correction, over the trained tokens
ess/sequence                 share  the same over whole responses, w the product over their tokens
ratio/mean*                  -      mean of w; near 1 as long as the log-probabilities are right
ratio/max                    -      largest w
ratio/p01                    -      1% quantile of w (all quantiles are within 7.5% of log w)
ratio/p10                    -      10% quantile of w
ratio/p25                    -      25% quantile of w
ratio/p50                    -      median of w
ratio/p75                    -      75% quantile of w
ratio/p90                    -      90% quantile of w
ratio/p99                    -      99% quantile of w
log_ratio/second_moment      -      mean of (log w)²: what `m2po` bounds
kl/behavior*                 nats   estimated KL(mu ‖ pi_prox) per token, mu the policy that sampled
mismatch/abs_log_ratio       nats   mean of |log w| over tokens of age 0: numerical gap of engine and trainer
mismatch/max_abs_log_ratio   nats   largest |log w| of these tokens
mismatch/kl                  nats   KL divergence over these tokens
drift/ess                    share  `ess` over all older tokens: the effect of staleness
drift/second_moment          -      mean of (log w)² over the older tokens
drift/kl                     nats   KL divergence over the older tokens

# Where the time goes
time/step_s                           s          the whole step; the next five add up to it
time/wait_s                           s          the trainer waited for its batch
time/train_s                          s          forward passes, backward passes and updates
time/publish_s                        s          publishing the weights, including waiting for engines
time/checkpoint_s                     s          a checkpoint kept the trainer waiting
time/other_s                          s          everything else
idle/trainer*                         share      part of the step in which the trainer waited for groups
idle/rollout*                         share      part of the step in which the engines had nothing to decode
threads/trainer                       threads    of the trainer, where they may change
throughput/generated_tokens_per_s*    tokens/s   tokens sampled by all workers, over the step
throughput/trained_tokens_per_s*      tokens/s   sampled tokens that were trained on, over the step
mfu/trainer                           share      of the GPUs' peak: forward and backward pass, over the step
mfu/rollout                           share      of the engines' peak: sampled tokens, without prompts
budget/gpu_hours                      GPU hours  spent so far: GPUs held times wall-clock time
budget/eta_s                          s          expected duration of the remaining steps
budget/expected_gpu_hours             GPU hours  expected cost of the whole run

# Where every role's time goes
> [States](#states) of each process. Those of a role add up to the wall clock between two looks at it.
state/{role}/{state}_s  s  the role's time in a state since the line before

# Engines and weights
rollout/workers      workers   rollout workers that have reported
rollout/lost/{role}  times     this worker was lost, since the coordinator started: it died, or was replaced
rollout/running      requests  requests being decoded now
rollout/waiting      requests  requests waiting for a slot now
weights/publish_s*   s         time to publish the version
weights/pause_s*     s         pause of an engine for its last weight update, mean over the engines
weights/pause_max_s  s         longest of these pauses
weights/stage_s      s         time to stage the weights while decoding goes on, of the slowest engine

# Weights to other hosts
> With `weights.transport: tcp`, the first with `collective`, too; the last two where there is something new.
weights/sent_bytes    bytes  sent from the trainer's host since the step before
weights/changed_frac  share  of its values that a version has changed, compared with the one before it
weights/delta_frac    share  size of the difference, compressed, beside the whole version

# The ledger
> The parts add up to what was generated, in every line.
ledger/generated_groups*  groups  groups admitted since the run started
ledger/trained_groups*    groups  of these, trained on
ledger/failed_groups*     groups  of these, failed in every attempt
ledger/dropped_groups*    groups  of these, dropped for any reason
ledger/in_flight_groups*  groups  of these, queued, leased, ready or in training
ledger/dropped/{reason}   groups  dropped groups, by reason (`constant`, `filtered`, `stale`)
ledger/returned_leases    leases  leases returned unfinished: a worker was lost or an attempt failed
ledger/generated_tokens   tokens  tokens sampled since the run started, as far as submitted
ledger/trained_tokens     tokens  of these, trained on
ledger/masked_tokens      tokens  of these, masked in trained groups because they were too stale
ledger/dropped_tokens     tokens  of these, in dropped groups, or in candidates that were not chosen
ledger/failed_tokens      tokens  of these, in failed attempts
ledger/in_flight_tokens   tokens  of these, in groups in flight
buffer/queued_groups      groups  returned groups waiting for the next lease
buffer/leased_groups      groups  groups leased to workers now
buffer/ready_groups       groups  finished groups that are in no batch yet
buffer/taken_groups       groups  groups in batches that the trainer holds now

# Evaluation
> With `evaluation`, in the line of the step that was done when a round was.
eval/version                      versions  policy version that was scored
eval/seconds                      s         that its round took
eval/generate_s                   s         of these, in which its engine had requests
eval/generate_frac                share     of the round in which its engine had requests (`evaluation.share`)
eval/{set}/reward/mean            -         mean reward of its responses to the prompts of a set
eval/{set}/reward/stderr          -         its standard error, by prompts (as of all that follow)
eval/{set}/reward/{part}/mean     -         mean of one part
eval/{set}/reward/{part}/stderr   -         its standard error
eval/{set}/pass@{k}/mean          share     chance that one of k responses to a prompt passes
eval/{set}/pass@{k}/stderr        share     its standard error
eval/{set}/response_tokens/mean   tokens    mean number of sampled tokens in a response
eval/{set}/response_tokens/stderr  tokens    its standard error
eval/{set}/truncated_frac         share     responses that were cut off at `rollout.max_new_tokens`
eval/{set}/length_controlled/mean  share     win rate by a judge, were lengths equal
eval/{set}/failed_prompts         prompts   left out: they failed in every attempt
earlier_rounds                    rounds    in the last line, all of the above of rounds that were done late

# Processes
> With `run.mode: async`.
memory/{role}_rss_bytes  bytes        host memory of the role and of every process that it started
rpc/refused              messages     messages refused by the coordinator: malformed or not allowed
rpc/refused_peers        connections  connections refused because they lacked the run's keys

# By the age of the tokens
> The same over the tokens of each age (in versions) alone.
age/{age}/tokens         tokens  trained tokens of this age
age/{age}/ess            share   as `ess`
age/{age}/ratio_mean     -       as `ratio/mean`
age/{age}/ratio_p01      -       as `ratio/p01`
age/{age}/ratio_p99      -       as `ratio/p99`
age/{age}/second_moment  -       as `log_ratio/second_moment`
age/{age}/kl             nats    as `kl/behavior`
age/{age}/clip_frac      share   as `clip_frac`
age/{age}/entropy        nats    as `entropy`
"""


def _groups() -> Iterator[MetricGroup]:
    for block in _TABLE.strip().split("\n\n"):
        title, *lines = block.splitlines()
        when = lines.pop(0).removeprefix("> ") if lines[0].startswith("> ") else ""
        rows = [re.split(" {2,}", line, maxsplit=2) for line in lines]
        metrics = [
            Metric(name.rstrip("*"), unit.strip("-"), meaning, name.endswith("*"))
            for name, unit, meaning in rows
        ]
        yield MetricGroup(title.removeprefix("# "), when, metrics)


GROUPS: Sequence[MetricGroup] = tuple(_groups())
METRICS: Mapping[str, Metric] = {metric.name: metric for group in GROUPS for metric in group.metrics}

BOARD_NAME = "tensorboard"
"""The folder of TensorBoard's files in a run directory."""

REQUIRED_KEYS: Sequence[str] = tuple(metric.name for metric in METRICS.values() if metric.is_always)
"""The keys that every line of `metrics.jsonl` has. A line may have more; TensorBoard gets all numbers."""

OVERVIEW: Mapping[str, str] = {
    "reward/mean": "reward",
    "response_tokens/mean": "response_tokens",
    "loss": "loss",
    "entropy": "entropy",
    "staleness/mean": "staleness",
    "idle/trainer": "idle_trainer",
    "idle/rollout": "idle_rollout",
}
"""What TensorBoard shows first, in this order, in addition to its usual place."""


def named(key: str) -> Metric | None:
    """The metric that a key of `metrics.jsonl` belongs to."""
    return METRICS.get(key) or next((METRICS[n] for n, like in _patterns() if like.fullmatch(key)), None)


def in_braces(key: str) -> Mapping[str, str]:
    """What the parts in braces of its metric's name are in this key, by their names there."""
    pattern = dict(_patterns()).get(metric.name) if (metric := named(key)) else None
    match = pattern.fullmatch(key) if pattern else None
    return match.groupdict() if match else {}


def scored_set(key: str) -> str:
    """The set of prompts, if it is the mean reward of one in an evaluation; else nothing."""
    match = re.fullmatch(r"eval/([^/]+)/reward/mean", key)
    return match[1] if match else ""


def unnamed(keys: Iterable[str]) -> list[str]:
    """The keys that are missing from the table."""
    return sorted({key for key in keys if named(key) is None})


def board_tags(key: str) -> list[str]:
    """Where TensorBoard shows a metric. It sorts by name: the overview comes first, and the many cards for
    single ages come last."""
    places = list(OVERVIEW)
    overview = [f"0_overview/{places.index(key) + 1}_{OVERVIEW[key]}"] if key in OVERVIEW else []
    return [*overview, f"z_{key}" if key.startswith("age/") else key]


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """The names with braces, each with its pattern."""
    return tuple(
        (name, re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(name))))
        for name in METRICS
        if "{" in name
    )
