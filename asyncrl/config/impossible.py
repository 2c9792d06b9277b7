"""Combinations of settings, each valid by itself, that cannot work together."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from asyncrl.config.data import CurriculumConfig, HintsConfig
from asyncrl.config.impossible_evaluation import impossible_evaluation
from asyncrl.config.messages import explain
from asyncrl.config.objective import CriticConfig, ObjectiveConfig, ReferenceConfig, TeacherConfig
from asyncrl.config.reward import INITIAL, PartConfig, RewardJudgeConfig, RewardRouteConfig
from asyncrl.config.rollout import ENGINES, RolloutConfig
from asyncrl.config.run import NetworkConfig
from asyncrl.config.schema import Config, StalenessConfig
from asyncrl.config.servers import impossible_key_env, impossible_urls
from asyncrl.config.trainer import BACKENDS
from asyncrl.objective.catalogue import (
    ADVANTAGES,
    BY_CRITIC,
    COMPARE_WITHIN_GROUPS,
    JUDGE_SUCCESS,
    PASS_K,
    POLICY_LOSSES,
    REJECTIONS,
    TOKEN_ADVANTAGES,
    TURN_ADVANTAGES,
    is_own,
)
from asyncrl.roles import ROLLOUT, TRAINER, names
from asyncrl.specs import Spec, find_spec

RANKS_WAIT_S = 240.0
"""Less than a trainer's ranks wait for each other in a collective."""


def impossible(c: Config) -> Iterator[str]:
    """Combinations of valid values that cannot work, each with its reason and remedy."""
    if c.trainer.mini_batches > c.trainer.batch_groups:
        yield (
            f"trainer.mini_batches={c.trainer.mini_batches} cannot split trainer.batch_groups="
            f"{c.trainer.batch_groups}: a mini-batch has at least one group; lower mini_batches"
        )
    if c.trainer.batch_tokens is not None and c.staleness.fixed_lag is not None:
        yield (
            f"trainer.batch_tokens={c.trainer.batch_tokens} ends batches early, and staleness.fixed_lag="
            f"{c.staleness.fixed_lag} has each version sample whole ones; leave one of them out"
        )
    yield from _impossible_data(c)
    compares = c.objective.advantage in COMPARE_WITHIN_GROUPS | {"pacs", "turn_grpo", "otb"}
    if c.rollout.group_size == 1 and compares and c.teacher is None:
        yield (
            f"rollout.group_size=1 leaves nothing to compare: `{c.objective.advantage}` advantages of a "
            "group of one are all 0; use rollout.group_size >= 2"
        )
    if c.rollout.min_new_tokens > c.rollout.max_new_tokens:
        yield (
            f"rollout.min_new_tokens={c.rollout.min_new_tokens} is over rollout.max_new_tokens="
            f"{c.rollout.max_new_tokens}: no response could end; lower it"
        )
    pass_k = c.objective.pass_k or PASS_K
    if c.objective.advantage == "pass_at_k" and pass_k >= c.rollout.group_size:
        yield (
            f"objective.pass_k={pass_k} leaves one subset of rollout.group_size={c.rollout.group_size} "
            "responses, and nothing to compare; use a larger group, or a smaller k"
        )
    if c.rollout.temperature == 0 and c.rollout.sampled > 1:
        yield (
            "rollout.temperature=0 samples the same response for the whole group, so nothing can be learnt "
            "from it; use a temperature above 0"
        )
    if c.run.resume == "auto" and c.run.dir is None:
        yield (
            "run.resume=auto continues the run in run.dir, but none is named: every start would begin "
            "another one; name it, such as run.dir=runs/mine"
        )
    yield from _impossible_choice(c)
    yield from _impossible_baseline(c)
    if c.rollout.gateway and c.rollout.episode is None:
        yield "rollout.gateway=true lets an episode's model answer over HTTP; name one by rollout.episode"
    if (c.rollout.episode or "").startswith("asyncrl.rollout.adapters.verifiers:"):
        if not c.rollout.gateway:
            yield f"rollout.episode={c.rollout.episode} asks the model over HTTP; set rollout.gateway=true"
        if c.data.hints is not None:
            yield (
                f"data.hints: rollout.episode={c.rollout.episode} asks what its environment says, and not "
                "the row's prompt, so no hint would be seen; leave them out"
            )
    yield from _impossible_staleness(c.staleness)
    yield from _impossible_objective(c.objective)
    yield from _impossible_reference(c)
    if c.teacher is not None:
        yield from _impossible_teacher(c.teacher, c.rollout, c.trainer.ranks)
    if c.replay is not None and (least := 1 / c.rollout.group_size) > c.replay.rare_below:
        yield (
            f"replay.rare_below={c.replay.rare_below:g} of rollout.group_size={c.rollout.group_size} is less "
            f"than one response, so no success would be rare; use {least:.2g} or more, or larger groups"
        )
    yield from _impossible_filter(c)
    yield from _impossible_max_rl(c)
    yield from _impossible_critic(c)
    yield from _impossible_rewards(c)
    yield from _impossible_devices(c)
    yield from _impossible_lora(c)
    yield from impossible_evaluation(c)
    yield from _impossible_network(c.network)
    yield from _impossible_guests(c)
    yield from _impossible_turns(c)
    yield from _impossible_by_spec(c, "rollout.settings", ENGINES, c.rollout.engine, c.rollout.settings)
    yield from _impossible_by_spec(c, "trainer.settings", BACKENDS, c.trainer.backend, c.trainer.settings)


def _impossible_by_spec(
    c: Config, key: str, folder: str, name: str, settings: Mapping[str, Any]
) -> Iterator[str]:
    """key: of the section that a user's own has its settings from."""
    spec = find_spec(Spec, folder, name)
    try:
        spec.settings.model_validate(settings)
    except ValidationError as error:
        yield from explain(error, list(spec.settings.model_fields), source=key, overridden=())
    else:
        yield from spec.impossible(c)


def _impossible_choice(c: Config) -> Iterator[str]:
    """`rollout.candidates` of which nothing is to be chosen, or not by this."""
    rollout = c.rollout
    if rollout.choose == "greedy_baseline":
        return
    if rollout.candidates is None:
        if rollout.choose != RolloutConfig().choose:
            yield (
                f"rollout.choose={rollout.choose} has nothing to choose from; set rollout.candidates to more "
                f"than rollout.group_size={rollout.group_size}"
            )
        return
    key = f"rollout.candidates={rollout.candidates}"
    if rollout.candidates <= rollout.group_size:
        yield (
            f"{key}: of so many responses rollout.group_size={rollout.group_size} are chosen; use more, or "
            "leave it out"
        )
    if rollout.choose == "first" and rollout.episode is not None and c.run.in_one_process:
        yield (
            f"{key}: which episode is done first hangs on how fast its process is, and run.mode={c.run.mode} "
            "may hang on nothing's pace; use another rollout.choose"
        )
    if rollout.choose == "max_variance" and rollout.group_size == 1:
        yield "rollout.choose=max_variance: a single response has no variance; use rollout.group_size >= 2"


def _impossible_baseline(c: Config) -> Iterator[str]:
    """A greedy response beside each group without an advantage that asks for it, or the other way round."""
    key, advantage = "rollout.choose=greedy_baseline", f"objective.advantage={c.objective.advantage}"
    if c.rollout.choose != "greedy_baseline":
        if c.objective.advantage == "remax":
            yield f"{advantage} compares with a greedy response to each prompt; set {key}, which samples one"
        return
    if c.objective.advantage != "remax" and not is_own(c.objective.advantage):
        yield f"{key} samples the baseline of objective.advantage=remax, and {advantage}; set both or neither"
    if c.rollout.candidates is not None:
        yield f"rollout.candidates={c.rollout.candidates}: with {key} none is left out; leave this out"
    if any(part.standardise for part in (*c.reward.scoring.values(), *c.reward.episode.values())):
        yield f"{key}: its reward is not standardised with the others; leave `standardise` out of the parts"
    if c.reward.likelihood is not None:
        yield f"{key}: reward.likelihood is of what is trained on, and not of it; leave one of them out"


def _impossible_reference(c: Config) -> Iterator[str]:
    """What a KL in the reward cannot be with."""
    if c.reference is None or c.reference.where != "reward":
        return
    if c.objective.advantage in JUDGE_SUCCESS:
        yield (
            f"reference.where=reward takes the KL off the rewards, by which objective.advantage="
            f"{c.objective.advantage} tells success from failure; use reference.where=loss"
        )
    if c.reference.ratio_cap is not None:
        yield (
            f"reference.ratio_cap={c.reference.ratio_cap} is for a KL in the loss, and reference.where="
            "reward; leave it out"
        )
    if c.reference.estimator not in ("k1", ReferenceConfig().estimator):
        yield (
            f"reference.estimator={c.reference.estimator} is for a KL in the loss, and with reference.where="
            "reward it is k1 always; leave it out"
        )


def _impossible_teacher(teacher: TeacherConfig, rollout: RolloutConfig, ranks: int) -> Iterator[str]:
    if teacher.offload and teacher.form == "exact":
        yield (
            "teacher.offload=true: with teacher.form=exact the teacher computes beside the policy, one "
            "micro-batch after the other; use teacher.form=sampled, or teacher.offload=false"
        )
    if (teacher.path is None) == (teacher.endpoint is None):
        yield "teacher: name the teacher either by teacher.path or, where a server has it, teacher.endpoint"
    if teacher.endpoint is None:
        return
    key = f"teacher.endpoint={teacher.endpoint}"
    yield from impossible_urls("teacher.endpoint", [teacher.endpoint], "http://HOST:PORT/v1")
    yield from impossible_key_env("teacher.api_key_env", teacher.api_key_env)
    if teacher.form == "exact":
        yield f"{key} tells of sampled tokens only; use teacher.form=sampled, or teacher.path"
    if rollout.temperature != 1 or rollout.top_p < 1 or rollout.top_k or rollout.min_new_tokens:
        yield (
            f"{key} gives probabilities at temperature 1 over the whole vocabulary, and the policy samples "
            "from others; use rollout.temperature=1 and no top_p, top_k and min_new_tokens, or teacher.path"
        )
    if ranks > 1 and (longest_s := teacher.timeout_s + teacher.patience_s) > RANKS_WAIT_S:
        yield (
            f"{key} may be waited for for teacher.timeout_s + teacher.patience_s = {longest_s:g} s, and the "
            f"ranks of a trainer wait for each other for {RANKS_WAIT_S:g} s; lower one of them"
        )


def _impossible_filter(c: Config) -> Iterator[str]:
    """`filter_constant_groups` where groups of equal rewards are what is learnt from."""
    if not c.objective.filter_constant_groups:
        return
    key, advantage = "objective.filter_constant_groups=true", c.objective.advantage
    if c.rollout.group_size == 1:
        yield f"{key}: every group of one (rollout.group_size=1) has equal rewards and would be dropped"
    if not is_own(advantage) and advantage not in COMPARE_WITHIN_GROUPS | {"otb"}:
        yield (
            f"{key}: objective.advantage={advantage} learns from groups of equal rewards, too, and they "
            "would be dropped; leave the filter out"
        )
    if c.sft is not None and c.sft.choose == "failed":
        yield (
            f"{key}: sft.choose=failed is for groups in which every response has failed, and they would be "
            "dropped; leave the filter out, or use sft.choose=all"
        )
    if c.replay is not None:
        yield (
            f"{key}: `replay` is for groups in which every response has failed, too, and they would be "
            "dropped; leave one of them out"
        )
    if c.learns_without_rewards:
        yield f"{key}: groups teach by more than what is known when they are filtered; leave the filter out"
    if c.reference is not None and c.reference.where == "reward":
        yield (
            f"{key}: with reference.where=reward equal rewards differ by their KL, and it is not known yet "
            "when groups are filtered; use reference.where=loss, or leave the filter out"
        )


def _impossible_max_rl(c: Config) -> Iterator[str]:
    """What makes rewards negative, by whose mean `max_rl` divides."""
    if c.objective.advantage != "max_rl":
        return
    parts = (*c.reward.scoring.values(), *c.reward.episode.values())
    lowering = {
        "reward.overlong": c.reward.overlong.buffer_tokens > 0,
        "reward.format": c.reward.format.pattern is not None,
        "`standardise` of a part": any(part.standardise for part in parts),
    }
    for key in (key for key, does in lowering.items() if does):
        yield (
            f"{key} makes rewards negative, and objective.advantage=max_rl is for rewards of at least 0: the "
            "run would end at the first negative one; leave it out, or use objective.advantage=grpo"
        )


def _impossible_network(network: NetworkConfig) -> Iterator[str]:
    if ipaddress.ip_address(network.bind).is_unspecified and network.advertise is None:
        yield (
            f"network.bind={network.bind} listens on every address of this machine, and other hosts must be "
            "told one of them; set network.advertise to a name or address that they reach"
        )


def _impossible_guests(c: Config) -> Iterator[str]:
    guests, scoring, episodes = c.rollout.guests, c.reward.guests, c.rollout.episode_guests
    for key, n in c.guests.items():
        if n and c.run.in_one_process:
            yield (
                f"{key}={n}: others join a run of several processes, and run.mode={c.run.mode} has "
                "one; use run.mode=async, or leave it out"
            )
    if scoring and not c.reward.models:
        yield f"reward.guests={scoring}: there is no reward model to score by (reward.models); leave it out"
    if episodes and c.rollout.episode is None:
        yield f"rollout.episode_guests={episodes}: there is no rollout.episode to carry out; leave it out"
    if guests and c.weights_stay_here and not ipaddress.ip_address(c.network.bind).is_loopback:
        yield (
            f"rollout.guests={guests}: workers may join from other hosts (network.bind={c.network.bind}), "
            f"which weights.transport={c.weights.transport} does not reach; use weights.transport=tcp, or "
            "leave it out"
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
    advantage = c.objective.advantage
    if advantage in BY_CRITIC and c.critic is None:
        yield (
            f"objective.advantage={advantage} takes its values from a critic, but there is none; add a "
            "section `critic:` (it may be empty: `critic: {}`), or use objective.advantage=grpo"
        )
    if c.critic is not None and advantage not in BY_CRITIC:
        yield (
            f"critic: objective.advantage={advantage} uses no critic; leave the section out, or use "
            f"objective.advantage={' or '.join(BY_CRITIC)}"
        )
    for key, needed in (("whiten", BY_CRITIC), ("bootstrap_truncated", tuple(TOKEN_ADVANTAGES))):
        if getattr(c.objective, key) and advantage not in needed:
            yield (
                f"objective.{key} is for {', '.join(needed)}, and objective.advantage={advantage}; leave it "
                "out"
            )
    if advantage in TURN_ADVANTAGES and c.rollout.episode is None:
        yield (
            f"objective.advantage={advantage} is of an episode's turns, and without rollout.episode a "
            "response is one turn; name an episode, or use objective.advantage="
            f"{'gae' if advantage in BY_CRITIC else 'grpo'}"
        )
    if c.critic is not None and c.critic.value_range[0] >= c.critic.value_range[1]:
        bounds = list(c.critic.value_range)
        yield f"critic.value_range={bounds}: write the lower bound first, then a higher one"
    elif c.critic and c.critic.bins is None and c.critic.value_range != CriticConfig().value_range:
        bounds = list(c.critic.value_range)
        yield f"critic.value_range={bounds} is for critic.bins, which is null; leave it out"
    if c.objective.bootstrap_truncated and c.objective.mask_truncated:
        yield (
            "objective.bootstrap_truncated and objective.mask_truncated: responses that were cut off are "
            "either trained on or left out; set one of them"
        )


def _impossible_objective(objective: ObjectiveConfig) -> Iterator[str]:
    """Settings that neither the policy loss nor the advantage has."""
    chosen = {
        f"objective.policy_loss={objective.policy_loss}": POLICY_LOSSES.get(objective.policy_loss),
        f"objective.advantage={objective.advantage}": ADVANTAGES.get(objective.advantage),
    }
    has = {name: entry.settings if entry else ("settings",) for name, entry in chosen.items()}
    entries = {**POLICY_LOSSES, **ADVANTAGES}
    for key in dict.fromkeys(key for entry in entries.values() for key in entry.settings):
        value = getattr(objective, key)
        if value is None or any(key in settings for settings in has.values()):
            continue
        others = ", ".join(name for name, entry in entries.items() if key in entry.settings)
        having = "; ".join(f"{name} has {', '.join(keys) or 'none'}" for name, keys in has.items())
        yield f"objective.{key}={value} is a setting of {others}, and not of what is chosen: {having}"
    for what, one, other in (("ratio", "ratio_low", "ratio_high"), ("covariance", "cov_low", "cov_high")):
        low, high = getattr(objective, one), getattr(objective, other)
        if low is not None and high is not None and low > high:
            yield f"objective.{one}={low} is above objective.{other}={high}: no {what} lies between them"
    loss = POLICY_LOSSES.get(objective.policy_loss)
    if objective.proximal != "recompute" and loss is not None and not loss.has_proximal:
        having = ", ".join(name for name, entry in POLICY_LOSSES.items() if entry.has_proximal)
        yield (
            f"objective.proximal={objective.proximal}: objective.policy_loss={objective.policy_loss} has no "
            f"proximal policy; those that have: {having}"
        )
    for key in ("behavior_cap", "behavior_level") if objective.proximal == "behavior" else ():
        if (value := getattr(objective, key)) is not None:
            yield (
                f"objective.{key}={value}: with objective.proximal=behavior the correction is 1 for every "
                "token; leave it out"
            )
    target, step = objective.entropy_target, objective.entropy_step
    if target is not None and not objective.entropy_coef:
        yield (
            f"objective.entropy_target={target} moves the weight of the entropy bonus between 0 and "
            "objective.entropy_coef, which is 0; set that, to 0.005 or so"
        )
    if target is None and step != ObjectiveConfig().entropy_step:
        yield f"objective.entropy_step={step} is for objective.entropy_target, which is null; leave it out"
    for key, owner, needed in (("ewma_decay", "proximal", "ewma"), ("ess_base", "step_size", "vcpo")):
        value, chosen_value = getattr(objective, key), getattr(objective, owner)
        if chosen_value != needed and value != getattr(ObjectiveConfig(), key):
            yield (
                f"objective.{key}={value} is for objective.{owner}={needed}, and it is {chosen_value}; leave "
                "it out"
            )
    yield from _impossible_rejection(objective)
    if objective.settings and all(chosen.values()):
        yield (
            f"objective.settings={objective.settings} are for an objective or advantage of your own "
            f"(package.module:function), and {' and '.join(chosen)} are not; set their own keys"
        )


def _impossible_rejection(objective: ObjectiveConfig) -> Iterator[str]:
    above, below = objective.reject_above, objective.reject_below
    is_bounded = above is not None or below is not None
    if objective.reject is not None and not is_bounded:
        yield (
            f"objective.reject={objective.reject} has no bound, and would reject nothing; set "
            "objective.reject_above (nats)"
        )
    if objective.reject is None and (is_bounded or objective.reject_only_negative):
        yield (
            "objective.reject_above, reject_below and reject_only_negative say what objective.reject leaves "
            f"out, and it is null; set it to one of {', '.join(REJECTIONS)}"
        )
    if above is not None and above < 0 and objective.reject is not None and objective.reject[-2:] != "k1":
        yield (
            f"objective.reject_above={above}: objective.reject={objective.reject} is never below 0, so every "
            "sequence would be rejected; give a bound above 0"
        )
    if above is not None and below is not None and below > above:
        yield (
            f"objective.reject_below={below} is above objective.reject_above={above}: every sequence would "
            "be rejected"
        )


def _impossible_rewards(c: Config) -> Iterator[str]:
    reward = c.reward
    scoring = reward.scoring
    if not scoring and c.rollout.episode is None and not c.learns_without_rewards:
        yield "reward: nothing scores a response; give reward.functions or reward.models, or reward.judges"
    elif scoring and all(part.weight == 0 for part in scoring.values()) and not c.learns_without_rewards:
        yield "reward: every weight is 0, so every reward would be 0; give a function or model a weight"
    elif c.rollout.episode is None and not any(part.weight for part in scoring.values()):
        yield from _impossible_without_rewards(c)
    for name, count in Counter([*reward.part_names, *reward.episode]).items():
        if count > 1:
            yield (
                f"reward has {count} parts called `{name}`, which the metrics could not tell apart; give "
                "each a `name` of its own"
            )
    if reward.episode and c.rollout.episode is None:
        yield "reward.episode says how an episode's parts count; name an episode by rollout.episode"
    functions = {part.label for part in reward.called}
    for key, part in scoring.items():
        yield from _impossible_part(key, part, part.label, functions, "reward function")
    for name, of_episode in reward.episode.items():
        yield from _impossible_part(f"reward.episode.{name}", of_episode, name, {*reward.episode}, "part")
    for i, judge in enumerate(reward.judges):
        yield from _impossible_judge(f"reward.judges.{i}", judge, c.rollout.group_size)
        if judge.is_initial and c.run.in_one_process:
            yield (
                f"reward.judges.{i}.model={judge.model} is served by a process of its own, and run.mode="
                f"{c.run.mode} has none; use run.mode=async, or serve the model beside the run (url)"
            )
    if reward.thinking is not None and not all(reward.thinking):
        yield "reward.thinking: give what begins and what ends the thinking, such as [<think>, </think>]"
    yield from _impossible_routes(reward.route, {part.label for part in scoring.values()})
    for i, model in enumerate(reward.models):
        roles = {TRAINER, *names(ROLLOUT, c.rollout.workers)}
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
        yield from _impossible_pattern("reward.format.pattern", reward.format.pattern)


def _impossible_without_rewards(c: Config) -> Iterator[str]:
    """What asks for rewards where a worker gives none."""
    asks = {
        "data.hints": c.data.hints is not None,
        "data.curriculum": c.data.curriculum is not None,
        f"rollout.choose={c.rollout.choose}": c.rollout.choose in ("max_variance", "greedy_baseline"),
        "sft.choose=failed": c.sft is not None and c.sft.choose == "failed" and c.reward.likelihood is None,
        "replay": c.replay is not None and c.reward.likelihood is None,
    }
    for key in (key for key, does in asks.items() if does):
        yield (
            f"{key} goes by rewards, and nothing scores a response before it is trained on: all would be 0; "
            "give reward.functions, or leave it out"
        )


def _impossible_part(key: str, part: PartConfig, name: str, gates: set[str], what: str) -> Iterator[str]:
    """what: the `gates` are, among them perhaps the part itself."""
    if part.clip is not None and part.clip[0] >= part.clip[1]:
        yield f"{key}.clip={list(part.clip)}: write the lower bound first, then a higher one"
    if part.gate is not None and part.gate not in gates - {name}:
        yield f"{key}.gate={part.gate}: no other {what} of that name; {_there_are(gates)}"


def _impossible_judge(key: str, judge: RewardJudgeConfig, group_size: int) -> Iterator[str]:
    if judge.url is None and judge.model != INITIAL:
        yield (
            f"{key}.url is missing: name the server that has {key}.model={judge.model}, or use "
            f"{key}.model={INITIAL} for the initial policy"
        )
    yield from impossible_urls(f"{key}.url", [judge.url or "http://judge"], "http://HOST:PORT/v1")
    yield from impossible_key_env(f"{key}.api_key_env", judge.api_key_env)
    if judge.scale[0] >= judge.scale[1]:
        yield f"{key}.scale={list(judge.scale)}: write the worst mark first, then a higher one"
    if judge.asks == "criteria" and not judge.rubric and judge.rubric_column is None:
        yield f"{key}.asks=criteria needs criteria: give {key}.rubric, or {key}.rubric_column"
    if judge.rubric and not any(criterion.weight > 0 for criterion in judge.rubric):
        yield f"{key}.rubric: no criterion has a positive weight, so there is nothing to gain; give one such"
    if judge.asks != "pairs" and judge.opponents is not None:
        yield f"{key}.opponents is for {key}.asks=pairs, and it is {judge.asks}; leave it out"
    if judge.compares and group_size == 1:
        yield (
            f"{key}.asks={judge.asks} compares the responses of a group, and rollout.group_size=1; use "
            "rollout.group_size >= 2"
        )
    if judge.reply_pattern is not None:
        yield from _impossible_pattern(f"{key}.reply_pattern", judge.reply_pattern, groups=1)
    if judge.reply_pattern is not None and judge.asks != "score":
        yield f"{key}.reply_pattern is for {key}.asks=score, and it is {judge.asks}; leave it out"
    if judge.marks and judge.reply_pattern is None:
        yield f"{key}.marks are for the words that {key}.reply_pattern finds; give that, too"
    for word, mark in judge.marks.items():
        if not judge.scale[0] <= mark <= judge.scale[1]:
            yield f"{key}.marks.{word}={mark:g} is outside {key}.scale={list(judge.scale)}"


def _impossible_pattern(key: str, pattern: str, *, groups: int = 0) -> Iterator[str]:
    try:
        if re.compile(pattern).groups < groups:
            yield f"{key}={pattern!r} has no group; put parentheses around what it is to find"
    except re.error as error:
        yield f"{key}={pattern!r} is not a regular expression: {error}"


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


def _impossible_data(c: Config) -> Iterator[str]:
    data = c.data
    if not data.path and not data.mix:
        yield "`data.path` is missing: name a dataset, or several with their shares (data.mix)"
    if data.path and data.mix:
        yield (
            f"data.path={data.path} and data.mix both name datasets; put it into data.mix, or leave one of "
            "them out"
        )
    if data.curriculum is not None:
        yield from _impossible_curriculum(data.curriculum)
    if data.hints is not None:
        yield from _impossible_hints(data.hints, c.rollout.episode)
    for name, count in Counter(data.names).items():
        if count > 1:
            yield (
                f"data.mix has {count} datasets called `{name}`, which the metrics could not tell apart; "
                "give each a `name` of its own"
            )
    if c.trainer.batch_tokens is not None and data.drop_last:
        yield (
            "data.drop_last=true ends epochs with a batch, and with trainer.batch_tokens="
            f"{c.trainer.batch_tokens} these have various sizes; leave one of them out"
        )
    if data.mix and data.drop_last:
        yield (
            "data.drop_last=true needs a single dataset: a batch has prompts of several, so an epoch of "
            "none of them ends with a batch; leave it out"
        )
    changes = {0, *(each.from_step for each in data.mix), *(each.until_step or 0 for each in data.mix)}
    for step in sorted(changes) if data.mix else ():
        if step < c.run.steps and not any(each.has_step(step) for each in data.mix):
            yield (
                f"data.mix: no dataset has prompts for step {step} (from_step, until_step); the last one "
                "should have no until_step"
            )


def _impossible_hints(hints: HintsConfig, episode: str | None) -> Iterator[str]:
    low, high = hints.share
    if not 0 < low <= high < 1:
        yield f"data.hints.share={[low, high]}: write two shares between 0 and 1, the lower one first"
    if hints.give == "hint" and hints.column is None:
        yield "data.hints.column is missing: name the column with the hints, or use data.hints.give=prefix"
    if hints.give == "prefix" and episode is not None:
        yield (
            f"data.hints.give=prefix: rollout.episode={episode} begins its own responses; use "
            "data.hints.give=hint"
        )
    elif hints.train == "without" and episode is not None:
        yield (
            f"data.hints.train=without: rollout.episode={episode} makes its own prompts of a row, "
            "from which a hint cannot be taken away; use data.hints.train=with"
        )


def _impossible_curriculum(curriculum: CurriculumConfig) -> Iterator[str]:
    band, ours = curriculum.band, CurriculumConfig()
    if not 0 <= band[0] <= band[1] <= 1:
        yield f"data.curriculum.band={list(band)}: write two pass rates from 0 to 1, the lower one first"
    if curriculum.sampler != "band" and band != ours.band:
        yield (
            f"data.curriculum.band={list(band)} is for data.curriculum.sampler=band, and it is "
            f"{curriculum.sampler}; leave it out"
        )


def _impossible_lora(c: Config) -> Iterator[str]:
    if c.trainer.lora is not None and c.objective.proximal == "ewma":
        yield (
            "objective.proximal=ewma averages whole weights, and trainer.lora trains an adapter of them; use "
            "objective.proximal=recompute"
        )


def _there_are(names: Iterable[str]) -> str:
    return f"there are {', '.join(f'`{name}`' for name in sorted(names)) or 'none'}"


def _impossible_turns(c: Config) -> Iterator[str]:
    if not c.placement.in_turns:
        return
    key = "placement.colocate=turns"
    if c.rollout.kv_on_update != "recompute":
        yield (
            f"{key}: an engine that gives up its memory keeps no keys and values, and rollout.kv_on_update="
            f"{c.rollout.kv_on_update} would; use rollout.kv_on_update=recompute"
        )
    if c.transport == "collective":
        yield (
            f"{key}: weights.transport=collective sends from GPU to GPU, and only one of the two has memory "
            "at a time; use weights.transport=auto"
        )
    if c.rollout.guests:
        yield (
            f"{key} has engines wait for the trainer, and guests (rollout.guests={c.rollout.guests}) compute "
            "elsewhere; use rollout.guests=0"
        )
    if c.teacher is not None and c.teacher.path is not None and c.teacher.form == "exact":
        yield (
            f"{key} keeps frozen models in host memory, and teacher.form=exact has the teacher compute "
            "beside the policy; use teacher.form=sampled, or teacher.endpoint"
        )


def _impossible_devices(c: Config) -> Iterator[str]:
    if c.run.in_one_process and c.rollout.workers > 1:
        yield f"run.mode={c.run.mode} has one engine; use rollout.workers=1, not {c.rollout.workers}"
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
