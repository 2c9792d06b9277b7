"""What ZeRO keeps, against what real DeepSpeed keeps on two ranks: every tensor that lives is counted."""

import json
import math

import pytest
import zero_rank
from forked import run_ranks
from zero_rank import LARGEST, PARAMETERS, RANKS

from asyncrl.config import dump, from_tree
from asyncrl.decoders.facts import DTYPE_BYTES
from asyncrl.trainer.backends.deepspeed.memory import memory_of

DEADLINE_S = 200.0


def zero_config(stage, dtype="bfloat16", **zero):
    small = {"reduce_bucket_size": 50_000, "stage3_param_persistence_threshold": 0}
    return from_tree(
        {
            "model": {"path": "m", "dtype": dtype},
            "data": {"path": "d"},
            "reward": {"functions": [{"function": "a:b"}]},
            "trainer": {
                "backend": "deepspeed",
                "ranks": RANKS,
                "deepspeed": {"zero_stage": stage, "zero": small | zero},
            },
        }
    )


CONFIGS = {
    "stage-1": zero_config(1),
    "stage-2": zero_config(2),
    "stage-2-float32": zero_config(2, "float32"),
    "stage-3": zero_config(3),
    "stage-3-in-parts": zero_config(3, sub_group_size=PARAMETERS // 4),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """By config, what each rank has counted."""
    folder = tmp_path_factory.mktemp("zero")
    paths = []
    for name, config in CONFIGS.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(dump(config))
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    run_ranks(zero_rank.main, paths, logs=logs, deadline_s=DEADLINE_S)
    return {
        path.stem: [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(RANKS)]
        for path in paths
    }


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_are_what_deepspeed_keeps_and_takes(name, counted):
    value_bytes = DTYPE_BYTES[CONFIGS[name].model.dtype]
    zero = memory_of(CONFIGS[name], value_bytes, on_gpu=False)
    parts, _ = zero.kept(PARAMETERS)
    largest = math.prod(LARGEST)
    last_gradient = value_bytes * largest + zero.sending(largest)
    backward = last_gradient + zero.arriving(PARAMETERS)
    peak = sum(parts.values()) + max(backward, zero.updating(PARAMETERS, largest))
    # Stage 2 lets go of what an update has used up; the others hold gradients and buckets for ever.
    of_update = {"gathered weights"} | ({"gradients", "reduce buckets"} if zero.stage == 2 else set())
    stays = sum(n_bytes for part, n_bytes in parts.items() if part not in of_update)
    for rank in counted[name]:
        assert stays == pytest.approx(rank["between"], rel=0.02)
        assert peak == pytest.approx(rank["peak"], rel=0.15)


def test_what_the_settings_leave_open_is_deepspeeds_default():
    zero = memory_of(zero_config(3), 2, on_gpu=True)
    assert (zero.bucket, zero.sub_group, zero.live) == (50_000, 10**9, 10**9)
    assert memory_of(zero_config(2, overlap_comm=True), 2, on_gpu=True).overlaps
