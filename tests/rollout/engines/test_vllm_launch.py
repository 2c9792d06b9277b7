"""What vLLM is started with: memory for keys and values where it must not look itself, the prefill budget."""

from functools import partial

import pytest

from asyncrl.launch.launcher import _environment
from asyncrl.plan.resources import Place, Placement
from asyncrl.rollout.engines.spec import SHARES_GPU
from asyncrl.rollout.engines.vllm.kv_cache import (
    SPARE_KV_BLOCKS,
    room_bytes,
    shared_gpu_bytes,
    workspace_bytes,
)

CARD_BYTES = 80 * 10**9
QWEN3_1_7B = {"hidden_size": 2048, "vocab_size": 151_936, "value_bytes": 2}
KV_BYTES_PER_TOKEN = 2 * 28 * 8 * 128 * 2


def test_a_full_engine_fits_into_its_room():
    blocks = room_bytes(3, 100, 16, token_bytes=10) / (16 * 10)
    assert blocks == 3 * 7 + SPARE_KV_BLOCKS


def test_a_shared_gpu_is_used_up_to_the_engines_share_and_no_further_than_it_can_fill():
    workspace = workspace_bytes(prefill_tokens=8192, sequences=256, **QWEN3_1_7B)
    kv_bytes = partial(
        shared_gpu_bytes,
        card_bytes=CARD_BYTES,
        weights_bytes=2 * 1_720_574_976,
        workspace_bytes=workspace,
    )
    large = room_bytes(512, 3072, 16, KV_BYTES_PER_TOKEN)
    taken = kv_bytes(utilization=0.4, room_bytes=large) + 2 * 1_720_574_976 + workspace
    assert taken == 0.4 * CARD_BYTES
    small = room_bytes(16, 3072, 16, KV_BYTES_PER_TOKEN)
    assert kv_bytes(utilization=0.4, room_bytes=small) == small
    assert kv_bytes(utilization=0.05, room_bytes=small) < 0


def test_a_worker_knows_whether_it_is_alone_on_its_gpus(make_config):
    config = make_config()
    alone, beside, other, split = (
        Place("rollout-0", "cuda", (1,), 1),
        Place("rollout-1", "cuda", (2,), 1),
        Place("reward-0", "cuda", (2,), 1),
        Place("rollout-2", "cuda", (2, 3), 1),
    )
    shares = {
        place.role
        for place in (alone, beside, split)
        if SHARES_GPU in _environment(place, Placement((alone, beside, other, split)), config)
    }
    assert shares == {"rollout-1", "rollout-2"}
    nowhere = Place("rollout-0", "cpu", (), 1)
    assert SHARES_GPU not in _environment(nowhere, Placement((nowhere,)), config)


@pytest.mark.vllm
def test_what_vllm_is_told_about_a_gpu(make_qwen3, tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    from asyncrl.rollout.engines.vllm.launch import LaunchSettings, _arguments, _share_gpu

    model = make_qwen3(hidden=128)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    of_gpu = partial(LaunchSettings, str(tmp_path), "bfloat16", device="cuda")

    def budget(**settings):
        return _arguments(of_gpu(**settings)).max_num_batched_tokens

    assert budget(capacity=64, max_length=512) == 8192
    assert budget(capacity=64, max_length=20_000) == 8192  # longer prompts are computed in pieces
    assert budget(capacity=64, max_length=512, prefill_tokens=1024) == 1024
    assert budget(capacity=2048, max_length=512, prefill_tokens=1024) == 2048  # vLLM takes no less

    monkeypatch.setattr(current_platform, "get_device_total_memory", lambda: CARD_BYTES)
    settings = of_gpu(capacity=8, max_length=512, shares_gpu=True, gpu_memory_utilization=0.4)
    config = _arguments(settings).create_engine_config()
    block = config.cache_config.block_size
    token_bytes = 2 * 2 * 2 * 32 * 2  # keys and values, two layers, two heads of 32, bfloat16
    _share_gpu(config, settings, 10**9)
    cache, room = config.cache_config, room_bytes(8, 512, block, token_bytes)
    assert cache.kv_cache_memory_bytes == room
    # It is to start wherever so much is free: the trainer may have more than 60% of the GPU by then.
    assert 10**9 + room < cache.gpu_memory_utilization * CARD_BYTES < 10**9 + room + 3 * 10**9
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.4 of a GPU of 80\.0 GB does not hold"):
        _share_gpu(config, settings, 31 * 10**9)
