"""`asyncrl.evaluate_model`: what `asyncrl eval` does for a model, as one call."""

from __future__ import annotations

from asyncrl.config import Config, from_tree
from asyncrl.config.model_paths import with_model_paths
from asyncrl.event_loop import run_to_end
from asyncrl.loop.evaluate import Evaluation, evaluate, held_out
from asyncrl.runfiles.earlier_run import model_in


def evaluate_model(config: Config, model: str | None = None, *, limit: int | None = None) -> Evaluation:
    """Score a model on the held-out prompts of a config, with its sampling and its rewards.

    model: folder or hub name of a model, or the folder of a run (its newest checkpoint); None means
    `model.path`. limit: use only the first `limit` prompts. Raises `ConfigError` and `RunFailed`. May be
    called while an event loop is running (in a notebook).
    """
    path = model_in("model", model or config.model.path)
    checked = from_tree(config.model_dump(mode="json"))  # one that was made in Python never was
    config = with_model_paths(checked, {"model.path": path})
    return run_to_end(evaluate(config, held_out(config)[:limit]))
