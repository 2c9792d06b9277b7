"""What a config implies, against numbers worked out by hand."""

import pytest

from asyncrl.config import from_tree
from asyncrl.runtime.model_facts import ModelFacts
from asyncrl.runtime.outline import outline
from asyncrl.runtime.resources import assign

MODEL = ModelFacts(
    model_type="qwen3", parameters=1_000_000, vocab_size=1000, hidden_size=100, layers=2,
    kv_bytes_per_token=800, max_positions=2048,
)  # fmt: skip


def implied(*, gpus=0, rows=100, longest=24, **sections):
    tree = {
        "run": {"steps": 50},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "reward": {"functions": [{"function": "a:b"}], "workers": 2},
        "rollout": {"workers": 3, "slots": 10, "group_size": 4, "max_new_tokens": 40},
        "trainer": {"batch_groups": 6, "mini_batches": 4, "micro_batch_tokens": 512, "threads": 2},
        "staleness": {"max_staleness": 2},
    }
    for name, settings in sections.items():
        tree[name] = {**tree[name], **settings}
    config = from_tree(tree)
    return outline(config, assign(config, None, gpus), MODEL, rows, longest)


def test_sizes_of_a_step():
    o = implied()
    assert o.responses_per_step == 24
    assert o.max_response_tokens_per_step == 960
    assert o.max_tokens_per_step == 960 + 24 * 24
    assert (o.updates_per_step, o.groups_per_update, o.total_updates) == (4, 1.5, 200)
    assert o.epochs == 3.0


@pytest.mark.parametrize(("eta", "groups", "updates"), [(0, 6, 0), (1, 12, 4), (2, 18, 8), (16, 102, 64)])
def test_the_staleness_bound_in_groups_and_optimizer_updates(eta, groups, updates):
    o = implied(staleness={"max_staleness": eta})
    assert (o.max_groups_outstanding, o.max_staleness_updates) == (groups, updates)
    assert o.max_responses_outstanding == 4 * groups


def test_a_fixed_lag_is_the_bound():
    o = implied(staleness={"max_staleness": 16, "fixed_lag": 2})
    assert (o.max_groups_outstanding, o.max_staleness_updates) == (18, 8)


def test_processes():
    assert [(p.role, p.count, p.threads, p.gpus) for p in implied().processes] == [
        ("launcher", 1, 0, ()),
        ("coordinator", 1, 0, ()),
        ("rollout", 3, 1, ()),
        ("trainer", 1, 2, ()),
        ("reward functions", 6, 0, ()),
    ]
    assert implied().threads == 5
    assert [p.gpus for p in implied(gpus=4).processes] == [(), (), (1, 2, 3), (0,), ()]
    inline = implied(run={"mode": "inline"}, rollout={"workers": 1}).processes
    assert [(p.role, p.count) for p in inline] == [("inline", 1), ("reward functions", 2)]


def memory(o):
    return {m.role: m.parts for m in o.memory}


def test_memory_in_float32():
    o = implied()
    assert memory(o) == {
        "trainer": {
            "weights": 4_000_000,
            "float32 weights": 0,
            "gradients": 4_000_000,
            "optimizer": 8_000_000,
            "activations": 17 * 2 * 512 * 100 * 4,
            "logits": 2 * 4 * 1024 * 1000,
        },
        "rollout": {
            "weights": 4_000_000,
            "incoming weights": 4_000_000,
            "KV cache": 10 * 64 * 800,
            "logits": 2 * 4 * 10 * 1000,
        },
        "shared weights": {"two versions": 8_000_000},
    }
    trainer, rollout, shared = o.memory
    assert o.host_memory_bytes == trainer.total_bytes + 3 * rollout.total_bytes + shared.total_bytes
    assert implied(gpus=4).host_memory_bytes == shared.total_bytes
    assert implied(trainer={"device": "cpu"}, gpus=4).host_memory_bytes == 8_000_000 + trainer.total_bytes


def test_memory_in_bfloat16_with_checkpointing():
    trainer = memory(implied(model={"dtype": "bfloat16"}, trainer={"gradient_checkpointing": True}))[
        "trainer"
    ]
    assert trainer["weights"] == trainer["gradients"] == 2_000_000
    assert trainer["float32 weights"] == 4_000_000
    assert trainer["activations"] == (2 + 17) * 512 * 100 * 2


def test_what_is_paced_holds_no_model():
    o = implied(rollout={"engine": "paced"}, trainer={"backend": "paced"})
    assert [m.total_bytes for m in o.memory] == [0, 0, 0]
