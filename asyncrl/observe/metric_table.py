"""All metrics of a run: what each is, and in what unit. `docs/metrics.md` is written from this table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
    """Metrics that belong together. when: what has them, where not every run does."""

    title: str
    metrics: Sequence[Metric]
    when: str = ""


def _always(name: str, unit: str, meaning: str) -> Metric:
    return Metric(name, unit, meaning, is_always=True)


GROUPS: Sequence[MetricGroup] = (
    MetricGroup(
        "The step",
        (
            _always("step", "steps", "training steps done, this one included: counts from 1"),
            _always("version", "versions", "policy version that this step published"),
            _always("wall_s", "s", "since the run started, at the end of the step"),
            Metric("data/epoch", "epochs", "the dataset's epoch that prompts are taken from, from 0 on"),
            Metric(
                "schedule/total_steps", "steps", "that the run is expected to have, for the learning rate"
            ),
            Metric("warnings", "sentences", "what this step's metrics say is wrong, each told once"),
        ),
    ),
    MetricGroup(
        "Rewards",
        (
            _always("reward/mean", "", "mean reward of the trained trajectories"),
            _always("reward/std", "", "standard deviation of their rewards"),
            Metric("reward/{part}/mean", "", "mean of one part, as its function or model gave it"),
            Metric("reward/{part}/std", "", "standard deviation of that"),
            Metric("reward/{part}/running_mean", "", "over the batches so far, of a part with `standardise`"),
            Metric("reward/{part}/running_std", "", "the same: by what the part is divided"),
            Metric("reward_log/{name}", "", "mean of what a reward function logged under this name"),
            Metric(
                "reward_time/{who}/wait_s",
                "s",
                "that a group waited for the functions, or a response for a model, on average",
            ),
            Metric("reward_time/{who}/score_s", "s", "that scoring it took, on average"),
        ),
    ),
    MetricGroup(
        "Responses",
        (
            _always("response_tokens/mean", "tokens", "mean number of sampled tokens of a trajectory"),
            Metric("response_tokens/max", "tokens", "of the longest"),
            Metric(
                "truncated_frac", "share", "of the responses that were cut off at `rollout.max_new_tokens`"
            ),
        ),
    ),
    MetricGroup(
        "Staleness",
        (
            _always("staleness/mean", "versions", "mean staleness of the trained tokens"),
            _always("staleness/max", "versions", "largest staleness of a trained token"),
            Metric("trained_tokens", "tokens", "sampled tokens that this step trained on"),
            Metric("masked_tokens", "tokens", "sampled tokens of its batch that it left out, being too old"),
        ),
    ),
    MetricGroup(
        "Training",
        (
            Metric("loss", "", "of the policy, mean over the step's mini-batches"),
            Metric("grad_norm", "", "global norm of the gradient before clipping, mean over the updates"),
            Metric("skipped_updates", "updates", "that were left out, their gradient not being finite"),
            Metric("lr", "", "learning rate of the policy in this step"),
            _always("clip_frac", "share", "of the trained tokens, whose gradient the objective cut to 0"),
            _always("entropy", "nats", "mean entropy of the policy at the trained tokens"),
            Metric("adv/mean", "", "mean advantage of the trained tokens"),
            Metric("adv/std", "", "standard deviation of their advantages"),
            Metric(
                "adv/zero_groups_frac", "share", "of the groups, that teach nothing: all advantages are 0"
            ),
        ),
    ),
    MetricGroup(
        "The critic",
        (
            Metric("critic/loss", "", "mean loss of its values"),
            Metric(
                "critic/explained_variance",
                "",
                "of its targets by its values, before it saw the batch; 1 is all",
            ),
            Metric(
                "critic/clip_frac", "share", "of the tokens, whose value was clipped (`critic.value_clip`)"
            ),
            Metric(
                "critic/grad_norm", "", "global norm of its gradient before clipping, mean over the updates"
            ),
            Metric(
                "critic/skipped_updates", "updates", "that were left out, their gradient not being finite"
            ),
            Metric("critic/lr", "", "its learning rate in this step"),
            Metric("critic/target_mean", "", "mean of what its values are to become"),
        ),
        "Where there is a section `critic`.",
    ),
    MetricGroup(
        "Policy that trains against policy that sampled",
        (
            _always(
                "ess", "share", "effective sample size of the behaviour correction, of the trained tokens"
            ),
            _always("ratio/mean", "", "mean of w; near 1 as long as the log-probabilities are right"),
            Metric("ratio/max", "", "the largest w"),
            Metric(
                "ratio/p01",
                "",
                "1% of the tokens have at most this w (within 7.5% of log w, as all quantiles)",
            ),
            Metric("ratio/p50", "", "the median of w"),
            Metric("ratio/p99", "", "99% of the tokens have at most this w"),
            Metric("log_ratio/second_moment", "", "mean of (log w)²: what `m2po` bounds"),
            _always(
                "kl/behavior",
                "nats",
                "estimated KL divergence of the policy from the one that sampled, a token",
            ),
            Metric(
                "mismatch/abs_log_ratio",
                "nats",
                "mean of |log w| over tokens of age 0: engine against trainer, numerically",
            ),
            Metric("mismatch/max_abs_log_ratio", "nats", "the largest of these"),
            Metric("mismatch/kl", "nats", "the KL divergence over these tokens"),
            Metric("drift/ess", "share", "as `ess`, over all older tokens: what staleness does"),
            Metric("drift/second_moment", "", "mean of (log w)² over these"),
            Metric("drift/kl", "nats", "the KL divergence over these"),
        ),
        "w is pi_prox / mu of a token, never clamped ([objectives](objectives.md#what-to-watch)).",
    ),
    MetricGroup(
        "Where the time goes",
        (
            Metric("time/step_s", "s", "of the whole step; the next five add up to it"),
            Metric("time/wait_s", "s", "that the trainer waited for its batch"),
            Metric("time/train_s", "s", "of forward and backward passes and updates"),
            Metric("time/publish_s", "s", "of publishing the weights, the wait for engines included"),
            Metric("time/checkpoint_s", "s", "that a checkpoint kept the trainer waiting"),
            Metric("time/other_s", "s", "of everything else"),
            _always("idle/trainer", "share", "of the step in which the trainer waited for groups"),
            _always("idle/rollout", "share", "of the step in which the engines had nothing to decode"),
            _always("throughput/generated_tokens_per_s", "tokens/s", "sampled by all workers, over the step"),
            _always(
                "throughput/trained_tokens_per_s",
                "tokens/s",
                "sampled tokens that were trained on, over the step",
            ),
            Metric("budget/gpu_hours", "GPU hours", "spent so far: GPUs held, times wall-clock time"),
            Metric("budget/eta_s", "s", "that the steps to come are expected to take"),
            Metric("budget/expected_gpu_hours", "GPU hours", "that the whole run is expected to spend"),
        ),
    ),
    MetricGroup(
        "Engines and weights",
        (
            Metric("rollout/workers", "workers", "that have reported"),
            Metric("rollout/running", "requests", "that the engines are decoding, now"),
            Metric("rollout/waiting", "requests", "that wait for a slot, now"),
            _always("weights/publish_s", "s", "that publishing the version took"),
            _always(
                "weights/pause_s", "s", "that an engine paused for its last weight update, mean over engines"
            ),
            Metric("weights/pause_max_s", "s", "the longest of these pauses"),
            Metric(
                "weights/stage_s",
                "s",
                "of making the weights ready beside the decoding, of the slowest engine",
            ),
        ),
    ),
    MetricGroup(
        "The ledger",
        (
            _always("ledger/generated_groups", "groups", "admitted since the run started"),
            _always("ledger/trained_groups", "groups", "of them: trained on"),
            _always("ledger/failed_groups", "groups", "of them: failed, every attempt of them"),
            _always("ledger/dropped_groups", "groups", "of them: dropped, for whatever reason"),
            _always("ledger/in_flight_groups", "groups", "of them: queued, leased, ready or in training"),
            Metric(
                "ledger/dropped/{reason}",
                "groups",
                "of the dropped ones: for this reason (`constant`, `stale`)",
            ),
            Metric(
                "ledger/returned_leases",
                "leases",
                "that came back unfinished: a lost worker, a failed attempt",
            ),
            Metric("ledger/generated_tokens", "tokens", "sampled since the run started, as far as handed in"),
            Metric("ledger/trained_tokens", "tokens", "of them: trained on"),
            Metric(
                "ledger/masked_tokens", "tokens", "of them: in trained groups, and left out, being too old"
            ),
            Metric("ledger/dropped_tokens", "tokens", "of them: of dropped groups"),
            Metric("ledger/failed_tokens", "tokens", "of them: of failed attempts"),
            Metric("ledger/in_flight_tokens", "tokens", "of them: of groups in flight"),
            Metric("buffer/queued_groups", "groups", "given back, that the next lease takes, now"),
            Metric("buffer/leased_groups", "groups", "with workers, now"),
            Metric("buffer/ready_groups", "groups", "finished, and not yet in a batch, now"),
            Metric("buffer/taken_groups", "groups", "in batches that the trainer has, now"),
        ),
        "The parts add up to what was generated, in every line.",
    ),
    MetricGroup(
        "Processes",
        (
            Metric(
                "memory/{role}_rss_bytes", "bytes", "of the host's memory, with all that the role has started"
            ),
            Metric(
                "rpc/refused",
                "messages",
                "that the coordinator refused: malformed, or not the sender's to say",
            ),
            Metric("rpc/refused_peers", "connections", "without the run's keys, that were refused"),
        ),
        "With `run.mode: async`.",
    ),
    MetricGroup(
        "By the age of the tokens",
        (
            Metric("age/{age}/tokens", "tokens", "trained tokens of this age"),
            Metric("age/{age}/ess", "share", "as `ess`"),
            Metric("age/{age}/ratio_mean", "", "as `ratio/mean`"),
            Metric("age/{age}/ratio_p01", "", "as `ratio/p01`"),
            Metric("age/{age}/ratio_p99", "", "as `ratio/p99`"),
            Metric("age/{age}/second_moment", "", "as `log_ratio/second_moment`"),
            Metric("age/{age}/kl", "nats", "as `kl/behavior`"),
            Metric("age/{age}/clip_frac", "share", "as `clip_frac`"),
            Metric("age/{age}/entropy", "nats", "as `entropy`"),
        ),
        "The same over the tokens of each age alone, in versions.",
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for group in GROUPS for metric in group.metrics}

REQUIRED_KEYS: Sequence[str] = tuple(metric.name for metric in METRICS.values() if metric.is_always)
"""The keys that every line of `metrics.jsonl` has. Lines may have more; the ones with numbers go to
TensorBoard."""

OVERVIEW: Mapping[str, str] = {
    "reward/mean": "reward",
    "response_tokens/mean": "response_tokens",
    "loss": "loss",
    "entropy": "entropy",
    "staleness/mean": "staleness",
    "idle/trainer": "idle_trainer",
    "idle/rollout": "idle_rollout",
}
"""What TensorBoard shows first, in this order, besides where it belongs."""


def named(key: str) -> Metric | None:
    """The metric that a key of a line belongs to."""
    return METRICS.get(key) or next((METRICS[n] for n, like in _patterns() if like.fullmatch(key)), None)


def unnamed(keys: Iterable[str]) -> list[str]:
    """Those that the table lacks."""
    return sorted({key for key in keys if named(key) is None})


def board_tags(key: str) -> list[str]:
    """Where TensorBoard shows a metric. It sorts what it shows by name: the overview first, the many cards of
    the single ages last."""
    places = list(OVERVIEW)
    overview = [f"0_overview/{places.index(key) + 1}_{OVERVIEW[key]}"] if key in OVERVIEW else []
    return [*overview, f"z_{key}" if key.startswith("age/") else key]


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Of the names with braces."""
    return tuple(
        (name, re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(name)))) for name in METRICS if "{" in name
    )
