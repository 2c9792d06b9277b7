"""Computes what peers' own code gives for the tokens below, for `test_peers.py` to compare with.

Not a test: it runs where the peers are installed, each in an environment of its own, and writes
`values_PEER.json` beside itself.

    pip install verl==0.9.1     &&  python make_values.py verl
    pip install trl==1.16.0     &&  python make_values.py trl
    pip install areal==1.0.4    &&  python make_values.py areal
    pip install ray==2.60.0     &&  python make_values.py ray
    pip install hl-gauss-pytorch==0.3.0  &&  python make_values.py hl_gauss
    python make_values.py authors    # in a folder with OWNER/NAME of `AUTHORS`, cloned from GitHub
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import math
import sys
import typing
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROWS, COLUMNS = 12, 9


def inputs() -> dict[str, Tensor]:
    """float64[ROWS, COLUMNS] (rewards, groups: [ROWS]): responses of 1 to 9 tokens with holes in the mask.
    Where it is not set the numbers are arbitrary, but finite, as padding is."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(2, COLUMNS + 1, ROWS)
    mask = (np.arange(COLUMNS) < lengths[:, None]) & (rng.random((ROWS, COLUMNS)) < 0.75)
    mask[:, 0] = True
    mu = -rng.exponential(1.0, (ROWS, COLUMNS)) - 0.02
    prox = np.minimum(mu + rng.normal(0, 0.6, mu.shape), -0.01)
    logprobs = np.minimum(prox + rng.normal(0, 0.3, mu.shape), -0.01)
    arrays = {
        "mask": mask,
        "mu": mu,
        "prox": prox,
        "logprobs": logprobs,
        "ref": np.minimum(mu + rng.normal(0, 0.5, mu.shape), -0.01),
        "advantages": np.broadcast_to(rng.normal(size=ROWS)[:, None], mu.shape).copy(),
        "values": rng.normal(size=mu.shape),
        "penalties": np.where(mask, rng.normal(0, 0.1, mu.shape), 0.0),
        "ages": rng.integers(0, 5, mu.shape),
        "rewards": rng.random(ROWS),
        "groups": np.repeat([5, 2, 9], [3, 4, 5]),
        "success": (rng.random(ROWS) < 0.4).astype(np.float64),
        "entropy": rng.exponential(1.0, mu.shape),
        "parts": rng.integers(0, 65, (ROWS, 2)) / 64,
        "baselines": rng.random(3).repeat([3, 4, 5]),
    }
    p = np.exp(prox)
    arrays["squares"] = p**2 + (1 - p) ** 2 * rng.random(mu.shape)  # sum of squared probabilities
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Cases:
    """What a peer gives: `value` (a number or array) and `gradient` by the log-probabilities, by name."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.found[name] = {"value": value.tolist()}

    def loss(self, name: str, of: Callable[[Tensor], Tensor]) -> None:
        logprobs = inputs()["logprobs"].requires_grad_()
        value = of(logprobs)
        value.backward()
        assert logprobs.grad is not None
        self.found[name] = {"value": value.item(), "gradient": logprobs.grad.tolist()}


def installed(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def only(text: str, scope: dict[str, Any], *names: str) -> Callable[..., Any]:
    """The last of these functions (or classes) of a module's text, without the rest of it and all that it
    imports."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    for name in names:
        function = next(node for node in nodes if node.name == name)
        function.decorator_list = []
        exec(compile(ast.Module([function], []), name, "exec"), scope)
    return scope[names[-1]]


def of_verl() -> tuple[str, Cases]:
    import verl.trainer.ppo.core_algos as algos
    import verl.trainer.ppo.rollout_corr_helper as corrections
    from verl.workers.config import ActorConfig

    class Settings(ActorConfig):
        """What the losses read, without the checks of a whole run's config."""

        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

        def get(self, key: str, default: Any = None) -> Any:
            return self.__dict__.get(key, default)

    t, cases = inputs(), Cases()
    mask, index = t["mask"].double(), t["groups"].numpy()

    def settings(low: float = 0.2, high: float = 0.28, dual: float = 3.0, **more: Any) -> Settings:
        clip = {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": dual}
        return Settings(**clip, global_batch_info={}, tau_pos=1.0, tau_neg=1.05, policy_loss=Settings(**more))

    def weights(level: str, threshold: float | str) -> Tensor:
        return corrections.compute_rollout_correction_weights(t["prox"] - t["mu"], mask, level, threshold)[0]

    def loss(name: str, peer: str, old: str, mode: str, config: Settings, w: Tensor | None = None) -> None:
        cases.loss(
            name,
            lambda x: algos.get_policy_loss_fn(peer)(t[old], x, t["advantages"], mask, mode, config, w)[0],
        )

    tokens, sequences = "token-mean", "seq-mean-token-mean"
    loss("ppo", "vanilla", "mu", tokens, settings())
    for level in ("token", "sequence"):
        for mode in (tokens, sequences):
            name = f"decoupled_ppo/{level}/{mode}"
            loss(name, "vanilla", "prox", mode, settings(), weights(level, 2.0))
        loss(f"icepop/{level}", "vanilla", "prox", tokens, settings(), weights(level, "0.5_5.0"))
    loss("gspo", "gspo", "prox", sequences, settings(0.03, 0.05), weights("token", 2.0))
    loss("sapo", "sapo", "prox", sequences, settings(), weights("token", 2.0))
    loss("dppo", "dppo_tv", "mu", tokens, settings(0.2, 0.2, 20.0))
    loss("dppo_kl", "dppo_kl", "mu", tokens, settings(0.05, 0.05, 20.0))
    loss("cispo", "cispo", "mu", tokens, settings(1.0, 0.5))
    loss("gmpo", "geo_mean", "prox", sequences, settings(0.4, 0.4))
    loss(
        "clip_cov", "clip_cov", "prox", tokens, settings(clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=5.0)
    )
    held = settings(kl_cov_ratio=0.2, ppo_kl_coef=0.7)
    loss("kl_cov", "kl_cov", "prox", tokens, held, weights("token", 2.0))
    loss("dro", "dro", "mu", tokens, settings(dro_beta=0.3))
    loss("reinforce", "gpg", "mu", tokens, settings())
    modes = {"token_mean": tokens, "sequence_mean": sequences, "constant_length": "seq-mean-token-sum-norm"}
    for name, mode in modes.items():
        cases.loss(name, lambda x, mode=mode: algos.agg_loss(x * t["advantages"], mask, mode))
    for name, peers_name in {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}.items():
        x = t["logprobs"].clone().requires_grad_()
        estimate = algos.kl_penalty_forward(x, t["ref"], peers_name)
        # Its k1 alone leaves the choice of the token out of the gradient: by pi's ratio to itself it counts.
        weight = (x - x.detach()).exp() if name == "k1" else 1.0
        (gradient,) = torch.autograd.grad((weight * estimate).sum(), x)
        cases.found[name] = {"value": estimate.tolist(), "gradient": gradient.tolist()}
    v = t["values"].clone().requires_grad_()
    value_loss, _ = algos.compute_value_loss(v, t["mu"], t["ref"], mask, cliprange_value=0.5)
    (gradient,) = torch.autograd.grad(value_loss, v)
    cases.found["value_loss"] = {"value": value_loss.item(), "gradient": gradient.tolist()}
    for how in ("seq_sum", "seq_mean", "seq_max"):
        for k in ("k1", "k2", "k3"):
            if (how, k) != ("seq_max", "k1"):
                bounds = "0.7_1.3" if k == "k1" else "0.2"
                x = t["logprobs"] - t["mu"]
                kept = corrections.compute_rollout_rejection_mask(x, mask, f"{how}_{k}", bounds)[0]
                cases.add(f"rejection/{how.removeprefix('seq_')}_{k}", kept)

    last = COLUMNS - 1 - t["mask"].flip(1).long().argmax(1)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(ROWS), last] = t["rewards"]
    with_penalties = rewards + t["penalties"]
    of_groups = (rewards.clone(), mask, index)
    cases.add("grpo", algos.compute_grpo_outcome_advantage(*of_groups, epsilon=0.0)[0])
    cases.add("dr_grpo", algos.compute_grpo_outcome_advantage(*of_groups, norm_adv_by_std_in_grpo=False)[0])
    cases.add("rloo", algos.compute_rloo_outcome_advantage(rewards.clone(), mask, index)[0])
    cases.add("opo", algos.compute_opo_outcome_advantage(rewards.clone(), mask, index)[0])
    remax = algos.compute_remax_outcome_advantage(rewards.clone(), t["baselines"], mask)[0]
    cases.add("remax", remax * mask)  # which it leaves where the mask has holes
    optimal = algos.compute_multi_turn_optimal_token_baseline_advantage
    of_tokens = (with_penalties, mask, index, t["prox"], t["squares"])
    cases.add("otb", optimal(*of_tokens, handle_zero_tail=False, epsilon=0.0)[0])
    whitened = algos.compute_reinforce_plus_plus_outcome_advantage
    cases.add("reinforce_pp", whitened(rewards.clone(), mask, config=Settings(gamma=1.0))[0])
    cases.add("reinforce_pp/penalties", whitened(with_penalties, mask, config=Settings(gamma=1.0))[0])
    centred = algos.compute_reinforce_plus_plus_baseline_outcome_advantage
    cases.add("reinforce_pp_baseline", centred(rewards.clone(), mask, index)[0])
    exact = inspect.getsource(algos.compute_gdpo_outcome_advantage).replace("float32", "float64")
    gdpo = only(exact, vars(algos), "compute_gdpo_outcome_advantage")
    chosen = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 0.25]}
    parts = {name: t["parts"][:, i].numpy() for i, name in enumerate("ab")}
    shapes = {"prompts": torch.zeros(ROWS, 0), "attention_mask": t["mask"].long()}
    of_parts = gdpo(rewards, mask, index, 0.0, config=chosen, non_tensor_batch=parts, batch=shapes)
    cases.add("gdpo", of_parts[0])
    for name, discounts in {"gae": (1.0, 1.0), "gae/discounted": (0.9, 0.8)}.items():
        gamma, lam = torch.tensor(discounts, dtype=torch.float64)
        advantages, returns = algos.compute_gae_advantage_return(
            with_penalties, t["values"], mask, gamma, lam
        )
        cases.add(name, advantages)
        cases.add(f"{name}/targets", returns)
    return installed("verl"), cases


def of_trl() -> tuple[str, Cases]:
    from trl import GRPOTrainer

    t, cases = inputs(), Cases()
    mask, advantages = t["mask"].double(), t["advantages"][:, :1]
    log_ratio = (t["logprobs"] - t["mu"]) * mask
    cases.add("vespo/phi", GRPOTrainer.get_gamma_weights(advantages, log_ratio, mask, None))
    kept = GRPOTrainer.get_off_policy_mask(advantages, t["logprobs"], t["mu"], mask, 0.05)
    cases.add("off_policy_mask", kept)
    ranks = SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, **_: x)
    trainer = SimpleNamespace(accelerator=ranks)
    cases.add("top_entropy", GRPOTrainer.get_high_entropy_mask(trainer, t["entropy"], t["mask"], 0.8))
    return installed("trl"), cases


def of_areal() -> tuple[str, Cases]:
    """By the text of its functions alone: their module imports all of AReaL."""
    t, cases = inputs(), Cases()
    found = importlib.util.find_spec("areal")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "trainer/ppo/actor.py").read_text()
    names = {name: name.lower() for name in ("LOGLINEAR", "LINEAR", "ROLLOUT")}
    scope = {"torch": torch, **{f"PROX_APPROX_METHOD_{key}": value for key, value in names.items()}}
    approximate = only(text, scope, "compute_prox_logp_approximations")
    trained = 9  # the version that the step makes; tokens of age d come from d + 1 before it
    versions = trained - 1 - t["ages"]
    cases.add("loglinear", approximate(t["mu"], t["logprobs"], versions, trained, "loglinear")["loglinear"])
    mask_of = only(text, {"torch": torch}, "_get_m2po_loss_mask", "_apply_m2po_masking")
    # AReaL masks by the size of log r alone. The authors look at what the update drives further away only.
    driven = t["mask"] & ((t["logprobs"] - t["mu"]) * t["advantages"] > 0)
    kept = t["mask"] & (~driven | mask_of(t["mu"], t["logprobs"], driven, 0.1))
    of = t["advantages"] * kept / t["mask"].sum()
    cases.loss("m2po", lambda x: -((x - t["mu"]).exp() * of).sum())
    return installed("areal"), cases


def of_ray() -> tuple[str, Cases]:
    """RLlib's V-trace, by its text: it asks for gymnasium and more."""
    t, cases = inputs(), Cases()
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "rllib/algorithms/impala/vtrace_torch.py").read_text()
    scope = {
        "torch": torch,
        "convert_to_torch_tensor": lambda x, device: x,
        "VTraceReturns": SimpleNamespace,
    }
    vtrace = only(text, scope, "from_importance_weights")
    targets, advantages = torch.zeros(2, ROWS, COLUMNS, dtype=torch.float64)
    for row, mask in enumerate(t["mask"]):
        columns = (t["prox"] - t["mu"], t["values"], t["penalties"])
        log_rhos, values, rewards = (x[row, mask][:, None] for x in columns)
        rewards[-1] += t["rewards"][row]
        discounts = torch.full_like(values, 0.9)
        nothing = torch.zeros(1, dtype=torch.float64)
        of_row = vtrace(log_rhos, discounts, rewards, values, nothing, 1.2, None)
        targets[row, mask] = of_row.vs[:, 0]
        advantages[row, mask] = (of_row.pg_advantages / log_rhos.exp())[:, 0]  # the token's own is the loss's
    cases.add("vtrace", advantages)
    cases.add("vtrace/targets", targets)
    return installed("ray"), cases


def of_hl_gauss() -> tuple[str, Cases]:
    """Its text, in float64: it returns float32, and asks for einx."""
    t, cases = inputs(), Cases()
    found = importlib.util.find_spec("hl_gauss_pytorch")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "hl_gauss.py").read_text().replace(".float()", ".double()")
    scope = {
        **{name: getattr(torch, name) for name in ("Tensor", "tensor", "linspace", "is_tensor")},
        "torch": torch,
        "Module": torch.nn.Module,
        "F": torch.nn.functional,
        "sqrt": math.sqrt,
        "Callable": Callable,
        "contextmanager": contextmanager,
        "erf": torch.special.erf,
        "maybe": lambda f: f or (lambda x: x),
        "once": lambda f: f,
        "subtract": lambda _, bins, x: bins - x[..., None],
        "divide": lambda _, x, total: x / total[..., None],
        "DEFAULT_SIGMA_TO_BIN_RATIO": 2.0,
        "DEFAULT_OUT_OF_RANGE_TOLERANCE_SIGMA": 1.0,
    }
    only(text, scope, "exists", "default", "log")
    only(text.replace("@contextmanager", ""), scope, "precision_on_device")
    scope["precision_on_device"] = contextmanager(scope["precision_on_device"])
    layer = only(text, scope, "HLGaussLossFromSupport")
    edges = torch.linspace(-1.5, 1.5, COLUMNS + 1, dtype=torch.float64)
    of_bins = layer(edges, sigma_to_bin_ratio=0.75, clamp_to_range=True, warn_out_of_range=False)
    logits = t["logprobs"].clone().requires_grad_()
    loss = of_bins(logits, t["values"][:, 0], reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    cases.found["hl_gauss"] = {"value": loss.tolist(), "gradient": gradient.tolist()}
    cases.add("hl_gauss/value", of_bins(logits.detach()))
    return installed("hl-gauss-pytorch"), cases


AUTHORS = {
    "nangongrui-ngr/NGRPO": ("e7a380415a64", "verl/trainer/ppo/core_algos.py"),
    "TianHongZXY/RLVR-Decomposed": ("a5d4e7c1df60", "verl/trainer/ppo/core_algos.py"),
    "RUCAIBox/Passk_Training": ("c3ba575ecb31", "code/passk_adv.py"),
    "tajwarfahim/maxrl": ("c0698ebb439a", "verl/trainer/ppo/core_algos.py"),
    "mit-han-lab/vcpo": ("c7f030f0b772", "recipe/fully_async_policy/staleness_utils.py"),
    "ritzz-ai/PACS": ("bbe1dc6afd8e", "src/pacs/pacs_core_algos.py"),
    "biuboomc/CANON": ("7d6f814fb71f", "verl/trainer/ppo/core_algos.py"),
    "yaochaorui/Trinity-RFT": ("90d65caf6389", "trinity/algorithm/policy_loss_fn/topr_policy_loss.py"),
    "abaheti95/LoL-RL": ("9f8d81660bfa", "train_generation_task_with_off_policy_PG.py"),
    "SkyworkAI/Skywork-OR1": ("64e96afa213a", "verl/trainer/ppo/core_algos.py"),
    "YihongDong/RL-PLUS": ("eb4aa4d4e2d7", "rl_plus/verl/verl/recipe/rlplus_core_alg.py"),
    "alibaba/ROLL": ("8eb27cc2dc34", "roll/utils/functionals.py"),
    "openai/ppo-ewma": ("625dac7aceb9", "ppo_ewma/ppg.py"),
    "vanzll/verl-agent": ("d0b97244c50f", "gigpo/core_gigpo.py"),
}
"""Repositories with the commit and the file. All are the papers' authors', but for topr's, which is a copy of
Trinity-RFT's, and for turn_grpo's, a copy of GiGPO's."""


def of_authors() -> tuple[str, Cases]:
    torch.set_default_dtype(torch.float64)
    t, cases = inputs(), Cases()
    mask, index = t["mask"].double(), t["groups"].numpy()
    last = COLUMNS - 1 - t["mask"].flip(1).long().argmax(1)

    def function(repository: str, *names: str, **scope: Any) -> Callable[..., Any]:
        # What they add to deviations and means, so as not to divide by 0, would be seen in the sixth digit.
        text = (Path(repository) / AUTHORS[repository][1]).read_text().replace("1e-6", "1e-15")
        return only(
            text, {"torch": torch, "np": np, "defaultdict": defaultdict, **vars(typing), **scope}, *names
        )

    def of_responses(values: Tensor) -> Tensor:
        rewards = torch.zeros_like(mask)
        rewards[torch.arange(ROWS), last] = values
        return rewards

    rewards, success = of_responses(t["rewards"]), of_responses(t["success"])
    ngrpo = function("nangongrui-ngr/NGRPO", "compute_ngrpo_outcome_advantage")
    cases.add("ngrpo", ngrpo(rewards.clone(), mask, index, max_reward=1.25)[0])
    max_rl = function("tajwarfahim/maxrl", "compute_maxrl_outcome_advantage")
    cases.add("max_rl", max_rl(rewards.clone(), mask, index, epsilon=0.0)[0])
    signed = function("TianHongZXY/RLVR-Decomposed", "compute_psr_nsr_outcome_advantage")
    for name, kind in {"psr": "positive", "nsr": "negative", "nsr/weighted": "weighted"}.items():
        column = t["success"][:, None]  # their masks have no holes
        cases.add(name, signed(column, column, torch.ones(ROWS, 1), 1.0, kind, 0.1)[0] * mask)

    def choose(n: int, k: int) -> int:
        return math.comb(n, k) if n >= 0 else 0

    pass_at_k = function("RUCAIBox/Passk_Training", "calc_adv", "compute_advantage", comb=choose)
    cases.add("pass_at_k", pass_at_k(success.clone(), mask, index, 2)[0])

    log_ratio = ((t["prox"] - t["mu"]) * mask).sum(1)
    opob = function("mit-han-lab/vcpo", "get_weighted_mean", "compute_opob_baseline", TrajRecord=object)
    records = [
        SimpleNamespace(
            group_uid=group,
            reward_scalar=reward,
            rollout_seq_is=math.exp(ratio),
            grad_norm_unscaled=math.sqrt(length),  # by length, as here
        )
        for group, reward, ratio, length in zip(
            index.tolist(), t["rewards"].tolist(), log_ratio.tolist(), mask.sum(1).tolist(), strict=True
        )
    ]
    baselines = torch.tensor([float(opob(records, group, eps=0.0)) for group in index.tolist()])
    cases.add("opob", (t["rewards"] - baselines)[:, None] * mask)

    ess_of = function("mit-han-lab/vcpo", "compute_global_ess_ratio")
    w = log_ratio.exp()
    cases.add("vcpo", torch.tensor(ess_of(w.sum(), w.square().sum(), ROWS, eps=0.0)[1]))
    norm = function("alibaba/ROLL", "reward_norm")
    cases.add("lite_ppo", norm(t["rewards"], 4, norm_mean_type="group", norm_std_type="batch"))
    average = function("openai/ppo-ewma", "EwmaModel", PpoModel=torch.nn.Module, deepcopy=deepcopy, th=torch)
    layer = torch.nn.Linear(ROWS, 1, bias=False)
    layer.weight.data[:] = t["values"][:, 0]
    of_updates = average(layer, ewma_decay=0.8)
    averages = []
    for weights in t["values"].T[1:]:
        layer.weight.data[:] = weights
        of_updates.update()
        averages.append(of_updates.model_ewma.weight.data[0].clone())
    cases.add("ewma", torch.stack(averages, 1))
    cases.add("turn_grpo", _of_turns(function, t))

    canon = function("biuboomc/CANON", "compute_dr_length_on_mean_group_outcome_advantage")
    for share in (1.0, 0.3):
        cases.add(f"canon/{share}", canon(rewards.clone(), mask, index, _lambda=share, max_length=1)[0])

    names = ("compute_reward", "compute_rloo_outcome_advantage")
    implicit, relative = (function("ritzz-ai/PACS", name) for name in names)
    whole = log_ratio.clone().requires_grad_()
    loss = torch.zeros(())
    for group in t["groups"].unique():
        at = t["groups"] == group
        score = relative(
            implicit(torch.zeros(int(at.sum()), 1), whole[at, None], None, beta=0.5), int(at.sum())
        )
        loss = loss + torch.nn.BCEWithLogitsLoss(reduction="sum")(score[:, 0], t["success"][at])
    loss.backward()
    cases.add("pacs", -whole.grad[:, None] * mask)  # by the log-probability of each response

    topr = function(
        "yaochaorui/Trinity-RFT",
        "__call__",
        masked_mean=lambda x, at: (x * at).sum() / at.sum(),
        masked_loss=lambda x, at, loss_agg_mode: (x * at).sum() / at.sum(),
    )
    trainer = SimpleNamespace(advantage_threshold=0.0, loss_agg_mode="token-mean")

    def of_whole(x: Tensor) -> Tensor:
        """Each response as one token, as in the paper: the peer weighs by token."""
        pi, mu = (((y * mask).sum(1, keepdim=True)) for y in (x, t["mu"]))
        return topr(trainer, pi, mu, torch.ones_like(pi), t["advantages"][:, :1])[0]

    cases.loss("topr", of_whole)
    a_lol = _a_lol((Path("abaheti95/LoL-RL") / AUTHORS["abaheti95/LoL-RL"][1]).read_text())
    cases.loss("a_lol", lambda x: a_lol(x, t["mu"], mask, t["advantages"][:, 0]))

    means = SimpleNamespace(masked_mean=lambda x, at: (x * at).sum() / at.sum())
    rl_plus = function("YihongDong/RL-PLUS", "compute_token_on_off_policy_loss", verl_F=means)
    given = (t["advantages"], mask, 0.2, 0.2, t["mask"])
    cases.loss(
        "rl_plus",  # pi before the update is pi
        lambda x: rl_plus(x.detach(), x, *given, off_policy_strategy="RL-PLUS")["pg_loss"],
    )
    control = function("SkyworkAI/Skywork-OR1", "EntController")(0.0, 0.0025, 0.0, 0.001, 0.5, True)
    weights = []
    for entropy in t["entropy"].flatten().tolist():
        weights.append(control.value * control.entropy_loss_enabled)
        control.update(entropy)
    cases.add("entropy_weights", torch.tensor(weights))
    return ", ".join(f"{name} {commit}" for name, (commit, _) in AUTHORS.items()), cases


def _of_turns(function: Callable[..., Callable[..., Any]], t: dict[str, Tensor]) -> Tensor:
    """Each token is a turn, and turns of one number are as GiGPO's steps from one state."""
    mask = t["mask"]
    rows, columns = mask.nonzero().T
    numbers = (mask.cumsum(1) - 1)[mask]
    earned = t["penalties"].clone()
    last = COLUMNS - 1 - mask.flip(1).long().argmax(1)
    earned[torch.arange(ROWS), last] += t["rewards"]
    exact = SimpleNamespace(**vars(np) | {"float32": np.float64})
    torch_exact = SimpleNamespace(**vars(torch) | {"float32": torch.float64})
    scope = {"np": exact, "torch": torch_exact, "DataProto": object}
    returns_of = function("vanzll/verl-agent", "compute_step_discounted_returns", **scope)
    columns_of = {"rewards": earned[mask], "traj_uid": rows, "active_masks": torch.ones(len(rows))}
    batch = SimpleNamespace(
        batch={"input_ids": rows}, non_tensor_batch={name: x.numpy() for name, x in columns_of.items()}
    )
    returns = returns_of(batch, 0.9)
    states = [*zip(t["groups"][rows].tolist(), numbers.tolist(), strict=True)]
    norm = function("vanzll/verl-agent", "step_norm_reward")
    one = torch.ones(len(rows), 1)
    advantages = torch.zeros(ROWS, COLUMNS)
    advantages[rows, columns] = norm(returns, one, states, epsilon=0.0, remove_std=False)[:, 0]
    return advantages


def _a_lol(text: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The loss of a response by its script, whose statements are in the midst of a loop."""
    wanted = (
        ("baseline_per_response_log_probs", "sum"),
        ("per_response_log_probs", "sum"),
        ("importance_sampling_ratio", "exp"),
        ("importance_sampling_ratio", "clamp"),
        ("per_response_loss_with_importance_sampling", "importance_sampling_ratio * "),
        ("advantage", "clamp"),
        ("per_response_loss", "* advantage"),
    )
    found = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
    lines = [next(x for x in found if x.startswith(f"{name} = ") and what in x) for name, what in wanted]

    def loss(logprobs: Tensor, mu: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        scope = {
            "torch": torch,
            "args": SimpleNamespace(ppo_clip=0.9),
            # It calls by this name the negative of it.
            "per_token_log_probs": -logprobs,
            "baseline_per_token_log_probs": -mu,
            "response_mask": mask,
            "advantage": advantages,
        }
        exec("\n".join(lines), scope)
        return scope["per_response_loss"].mean()

    return loss


PEERS: dict[str, Callable[[], tuple[str, Cases]]] = {
    "verl": of_verl,
    "trl": of_trl,
    "areal": of_areal,
    "ray": of_ray,
    "hl_gauss": of_hl_gauss,
    "authors": of_authors,
}


def main() -> None:
    for peer in sys.argv[1:]:
        source, cases = PEERS[peer]()
        found = {"source": source, "cases": cases.found}
        (HERE / f"values_{peer}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
        print(f"{found['source']}: {', '.join(cases.found)}")


if __name__ == "__main__":
    main()
