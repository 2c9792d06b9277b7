"""Lines of metrics as a trainer would write them."""

import pytest


def metrics_line(step: int, **changes) -> dict:
    generated = 16 * step + 40
    line = {
        "step": step,
        "version": step,
        "wall_s": 10.0 + 2.0 * step,
        "reward/mean": min(0.9, 0.3 + 0.01 * step),
        "reward/std": 0.2,
        "staleness/mean": 1.25,
        "staleness/max": 3,
        "ess": 0.9,
        "ratio/mean": 1.01,
        "kl/behavior": 0.002,
        "clip_frac": 0.01,
        "entropy": 1.3,
        "response_tokens/mean": 13.5,
        "throughput/generated_tokens_per_s": 3000.0 + step,
        "throughput/trained_tokens_per_s": 2500.0,
        "idle/trainer": 0.125,
        "idle/rollout": 0.25,
        "weights/publish_s": 0.002,
        "weights/pause_s": 0.004,
        "ledger/generated_groups": generated,
        "ledger/trained_groups": generated - 40,
        "ledger/failed_groups": 3,
        "ledger/dropped_groups": 5,
        "ledger/in_flight_groups": 32,
    }
    return line | {key.replace("__", "/"): value for key, value in changes.items()}


@pytest.fixture
def make_line():
    return metrics_line
