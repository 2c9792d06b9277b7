"""Settings of what is optimised: the objective, its critic and its reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from asyncrl.config.own import named
from asyncrl.objective.catalogue import ADVANTAGES, POLICY_LOSSES, REJECTIONS, is_own
from asyncrl.section import Section


class ObjectiveConfig(Section):
    """What null means everywhere here: the objective's own default, which its signature declares."""

    advantage: Annotated[str, named(ADVANTAGES)] = "grpo"
    """Advantage estimator (docs/objectives.md), or your own: `package.module:function` or
    `path/file.py:function`."""
    policy_loss: Annotated[str, named(POLICY_LOSSES)] = "decoupled_ppo"
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
    ess_base: float = Field(1.0, gt=0, le=1)
    """`step_size: vcpo`: the share ESS / B at which the learning rate is whole, such as what `ess/sequence`
    is on fresh data."""
    reject: Literal[REJECTIONS] | None = None  # type: ignore[valid-type]
    """Leave whole sequences out by their distance from the policy (docs/objectives.md): sum, mean or max over
    their tokens of an estimate of KL(mu ‖ pi_theta)."""
    reject_above: float | None = None
    """`reject`: the largest distance that is kept, in nats."""
    reject_below: float | None = None
    """`reject`: the smallest distance that is kept, in nats (k1 has both signs)."""
    reject_only_negative: bool = False
    """`reject`: only tokens with a negative advantage (off-policy sequence masking)."""
    log_ratio_coef: float = Field(0.0, ge=0)
    """Weight of (log pi_theta / mu)² / 2 of each token in the loss: it pulls back to what sampled."""
    mask_truncated: bool = False
    """Do not train on responses that were cut off at `rollout.max_new_tokens`; their rewards still count
    where a group is compared."""
    bootstrap_truncated: bool = False
    """`gae`, `vtrace`: where a response was cut off, the critic's value there takes the place of its
    reward."""
    settings: dict[str, Any] = Field({})
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
    behavior_level: Literal["token", "sequence", "geometric"] | None = None
    """Whose ratio the behaviour correction is: the token's, that of its whole sequence (the product), or the
    sequence's geometric mean."""
    ratio_low: float | None = Field(None, ge=0)
    """Lower bound of the importance ratio: below it the ratio is clipped or its token left out, as the
    objective does."""
    ratio_high: float | None = Field(None, gt=0, allow_inf_nan=True)
    """Upper bound of the importance ratio."""
    max_second_moment: float | None = Field(None, ge=0)
    """`m2po` leaves out tokens until the mean of (log pi_theta / mu)² is at most this."""
    prob_delta: float | None = Field(None, gt=0, le=1)
    """`dppo` leaves out tokens whose probability has moved further than this."""
    max_divergence: float | None = Field(None, gt=0)
    """`dppo_kl` leaves out tokens whose binary KL divergence, in nats, is larger than this."""
    cov_share: float | None = Field(None, gt=0, le=1)
    """`clip_cov`: tokens to leave out, as a share of the mini-batch's; `kl_cov`: tokens to hold."""
    cov_coef: float | None = Field(None, gt=0)
    """`kl_cov`: how strongly they are held."""
    cov_low: float | None = None
    """`clip_cov`: lower bound of the covariances among which they are drawn."""
    cov_high: float | None = None
    """`clip_cov`: upper bound of these covariances."""
    power_pos: float | None = Field(None, gt=0)
    """`vespo`: power of the sequence's ratio where A >= 0."""
    decay_pos: float | None = Field(None, gt=0)
    """`vespo`: how fast its weight fades as the ratio grows where A >= 0."""
    power_neg: float | None = Field(None, gt=0)
    """`vespo`: power of the sequence's ratio where A < 0."""
    decay_neg: float | None = Field(None, gt=0)
    """`vespo`: how fast its weight fades as the ratio grows where A < 0."""
    tau_pos: float | None = Field(None, gt=0)
    """`sapo`: sharpness of the gate for tokens with a positive advantage."""
    tau_neg: float | None = Field(None, gt=0)
    """`sapo`: sharpness of the gate for other tokens."""
    deviation: Literal["population", "sample"] | None = None
    """`grpo`, `lite_ppo`, `ngrpo`, `turn_grpo`: whether the squares are divided by their number n, or by
    n - 1."""
    pass_k: int | None = Field(None, ge=1)
    """`pass_at_k`: the k."""
    inter_share: float | None = Field(None, ge=0, le=1)
    """`canon`: weight of the comparison with the other half, beside that within the own half."""
    score_scale: float | None = Field(None, gt=0)
    """`pacs`: what a response's log-ratio is multiplied by to be a score (its paper's beta)."""
    max_reward: float | None = None
    """`ngrpo`: the greatest reward that there is."""
    success_above: float | None = None
    """`nsr`, `psr`, `pacs`, `pass_at_k`: a response with a greater reward than this succeeded."""
    positive_weight: float | None = Field(None, ge=0)
    """`nsr`: advantage of a success; that of a failure is -1."""
    gamma: float | None = Field(None, gt=0, le=1)
    """`gae`, `vtrace`: discount of a token's later rewards; `turn_gae`, `turn_grpo`: of a turn's."""
    lam: float | None = Field(None, ge=0, le=1)
    """`gae`, `vtrace`, `turn_gae`: how far ahead rewards are taken as they came (1), rather than from the
    critic (0)."""
    rho_bar: float | None = Field(None, gt=0, allow_inf_nan=True)
    """`vtrace`: upper bound of a token's importance ratio in its own error; .inf leaves it whole."""
    c_bar: float | None = Field(None, gt=0, allow_inf_nan=True)
    """`vtrace`: upper bound of the ratio by which later errors reach a token."""
    whiten: bool = False
    """Advantages by a critic (`gae`, `vtrace`, `turn_gae`) less their mean, over their deviation, in each
    batch."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus; with `entropy_target` the greatest."""
    entropy_target: float | None = Field(None, gt=0)
    """Entropy, in nats a token, below which the bonus counts: its weight then grows by `entropy_step` a step,
    and shrinks while the entropy is above. null keeps the weight."""
    entropy_step: float = Field(0.0001, gt=0)
    """`entropy_target`: what the weight changes by in each step."""
    entropy_share: float | None = Field(None, gt=0, le=1)
    """Only this share of each mini-batch's tokens, those of the highest entropy, has an advantage; null is
    all."""
    filter_constant_groups: bool = False
    """Drop groups whose rewards are all equal (they carry no gradient); their places are sampled again."""
    filter: Annotated[str, named(())] | None = None
    """Your own judgement of finished groups: `package.module:function` or `path/file.py:function`. It is
    given `rewards`, `tokens` and columns of the row by name, and returns whether the group is trained on
    (docs/data.md)."""

    @property
    def of_responses(self) -> dict[str, str]:
        """Of these settings those that weigh a whole response by its ratios."""
        weighing = {
            "policy_loss": ("topr", "vespo", "a_lol"),
            "advantage": ("opob", "pacs"),
            "step_size": ("vcpo",),
            "behavior_level": ("sequence",),
            "reject": tuple(name for name in REJECTIONS if name.startswith("sum_")),
        }
        return {key: value for key, by in weighing.items() if (value := getattr(self, key)) in by}

    def settings_of(self, name: str) -> dict[str, Any]:
        """What is set, other than by default, of the settings of the policy loss or advantage `name`."""
        if is_own(name):
            return self.settings
        entry = {**POLICY_LOSSES, **ADVANTAGES}[name]
        return {key: value for key in entry.settings if (value := getattr(self, key)) is not None}


class CriticConfig(Section):
    path: str | None = None
    """A folder with a Hugging Face decoder of the policy's vocabulary, or a hub name: the critic's backbone
    at the start. null takes another copy of `model.path`."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate of the critic; it has the schedule of `trainer.lr`."""
    value_clip: float | None = Field(0.5, gt=0)
    """An update gains nothing from moving a value further than this from what it was; null is off."""
    bins: int | None = Field(None, ge=2)
    """Train it as a classifier of so many bins of values (HL-Gauss; 51, say) in the place of regression;
    `value_clip` then does nothing."""
    value_range: tuple[float, float] = Field((0.0, 1.0), strict=False)
    """`bins`: lowest and highest value; targets beyond are taken for these. Leave a bin or two of room beyond
    the rewards: what a critic learns of the edge itself is 0.7 bins inside of it."""
    warmup_steps: int = Field(0, ge=0)
    """Training steps at the start in which only the critic learns. `trainer.warmup_steps` counts from the
    same start: the policy's rate rises only in those of its steps that are left."""
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
    ratio_cap: float | None = Field(None, gt=0)
    """Upper bound of pi_theta / mu, by which a token counts in the KL loss; null leaves it whole."""
    offload: bool = False
    """Keep the reference in host memory while it does not compute."""


class TeacherConfig(Section):
    path: str | None = None
    """A folder with a Hugging Face decoder of the policy's vocabulary, or a hub name."""
    endpoint: str | None = None
    """Instead of `path`, the base URL of a vLLM server of such a model, such as `http://HOST:8001/v1`
    (`form: sampled`)."""
    api_key_env: str | None = None
    """`endpoint`: name of the environment variable that holds the server's API key, where it asks for one."""
    concurrency: int = Field(64, ge=1)
    """`endpoint`: responses that it scores at a time."""
    timeout_s: float = Field(120.0, gt=0)
    """`endpoint`: a request without an answer for this long is taken for lost, as if the server were away."""
    patience_s: float = Field(120.0, ge=0)
    """`endpoint`: one that is away is asked again, with growing pauses, for this long; then the run ends."""
    kl_coef: float = Field(1.0, gt=0)
    """Weight of the KL divergence of the policy from the teacher, beside the advantages of rewards."""
    form: Literal["sampled", "exact"] = "sampled"
    """`sampled`: each sampled token's log-ratio of teacher and policy is added to its advantage. `exact`: the
    divergence over the whole vocabulary is added to the loss."""
    offload: bool = False
    """`sampled`: keep the teacher in host memory while it does not compute."""


class ReplayConfig(Section):
    coef: float = Field(1.0, gt=0)
    """What a replayed response counts, as a multiple of a fresh one."""
    success_above: float = 0.5
    """A response with a greater reward than this is a success."""
    rare_below: float = Field(0.25, gt=0, le=1)
    """Successes are rare while no more than this share of the row's newest group are: then they are
    remembered, and replayed when the row comes again."""
    ratio_cap: float = Field(2.0, gt=0, allow_inf_nan=True)
    """Upper bound of pi_theta / mu, by which a replayed token counts; .inf leaves it whole."""
    rows: int = Field(4096, ge=1)
    """Of so many rows at most successes are remembered; the row that came longest ago is forgotten first."""
