"""What a snapshot has written, for comparison."""

import json

import torch
from safetensors.torch import load_file


def state_of(folder):
    """Tensors by part and kind, and by name, whichever rank has written them; and the counts."""
    training = folder / "training"
    state = {}
    for path in training.glob("*.safetensors"):
        tensors = state.setdefault(".".join(path.name.split(".")[:2]), {})
        found = load_file(path)
        assert not tensors.keys() & found.keys(), f"{path}: another rank has written that, too"
        tensors |= found
    return state | {"counts": json.loads((training / "counts.json").read_text())["counts"]}


def assert_equal_states(found, expected, model="hf/model"):
    """Bit by bit, all that two folders hold for training, and their models."""
    found_state, expected_state = state_of(found), state_of(expected)
    assert found_state.pop("counts") == expected_state.pop("counts")
    assert found_state.keys() == expected_state.keys()
    models = [load_file(folder / f"{model}.safetensors") for folder in (found, expected)]
    for file, tensors in [*expected_state.items(), ("hf", models[1])]:
        others = models[0] if file == "hf" else found_state[file]
        assert others.keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            assert others[name].dtype == tensor.dtype, (file, name)
            assert torch.equal(others[name], tensor), (file, name)
