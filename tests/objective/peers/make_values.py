"""Computes what peers' own code gives for the tokens below, for `test_peers.py` to compare with.

Not a test: it runs where the peers are installed, each in an environment of its own, and writes
`values_PEER.json` beside itself.

    pip install verl==0.9.1     &&  python make_values.py verl
    pip install trl==1.16.0     &&  python make_values.py trl
    pip install areal==1.0.4    &&  python make_values.py areal
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
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
    }
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
    loss("dro", "dro", "mu", tokens, settings(dro_beta=0.3))
    for name, peers_name in {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}.items():
        cases.add(f"kl/{name}", algos.kl_penalty_forward(t["logprobs"], t["ref"], peers_name))
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
    whitened = algos.compute_reinforce_plus_plus_outcome_advantage
    cases.add("reinforce_pp", whitened(rewards.clone(), mask, config=Settings(gamma=1.0))[0])
    cases.add("reinforce_pp/penalties", whitened(with_penalties, mask, config=Settings(gamma=1.0))[0])
    centred = algos.compute_reinforce_plus_plus_baseline_outcome_advantage
    cases.add("reinforce_pp_baseline", centred(rewards.clone(), mask, index)[0])
    for name, discounts in {"gae": (1.0, 1.0), "gae/discounted": (0.9, 0.8)}.items():
        gamma, lam = torch.tensor(discounts, dtype=torch.float64)
        advantages, returns = algos.compute_gae_advantage_return(
            with_penalties, t["values"], mask, gamma, lam
        )
        cases.add(name, advantages)
        cases.add(f"{name}/targets", returns)
    return "verl", cases


def of_trl() -> tuple[str, Cases]:
    from trl import GRPOTrainer

    t, cases = inputs(), Cases()
    mask, advantages = t["mask"].double(), t["advantages"][:, :1]
    log_ratio = (t["logprobs"] - t["mu"]) * mask
    cases.add("vespo/phi", GRPOTrainer.get_gamma_weights(advantages, log_ratio, mask, None))
    kept = GRPOTrainer.get_off_policy_mask(advantages, t["logprobs"], t["mu"], mask, 0.05)
    cases.add("off_policy_mask", kept)
    return "trl", cases


def of_areal() -> tuple[str, Cases]:
    """By the text of its function alone: its module imports all of AReaL."""
    t, cases = inputs(), Cases()
    found = importlib.util.find_spec("areal")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "trainer/ppo/actor.py").read_text()
    function = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "compute_prox_logp_approximations"
    )
    names = {name: name.lower() for name in ("LOGLINEAR", "LINEAR", "ROLLOUT")}
    scope = {"torch": torch, **{f"PROX_APPROX_METHOD_{key}": value for key, value in names.items()}}
    exec(compile(ast.Module([function], []), "actor.py", "exec"), scope)
    trained = 9  # the version that the step makes; tokens of age d come from d + 1 before it
    versions = trained - 1 - t["ages"]
    approximate = scope["compute_prox_logp_approximations"]
    cases.add("loglinear", approximate(t["mu"], t["logprobs"], versions, trained, "loglinear")["loglinear"])
    return "areal", cases


PEERS: dict[str, Callable[[], tuple[str, Cases]]] = {"verl": of_verl, "trl": of_trl, "areal": of_areal}


def main() -> None:
    for peer in sys.argv[1:]:
        package, cases = PEERS[peer]()
        found = {"source": f"{package} {importlib.metadata.version(package)}", "cases": cases.found}
        (HERE / f"values_{peer}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
        print(f"{found['source']}: {', '.join(cases.found)}")


if __name__ == "__main__":
    main()
