import msgspec
import pytest
import torch

from asyncrl.weights.manifest import ALIGNMENT_BYTES, Manifest, TensorEntry, WeightNotice
from asyncrl.weights.source import LocalWeights, WeightsError, untied


def odd_tensors() -> dict[str, torch.Tensor]:
    return {
        "bf16": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "f8": torch.randn(9).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
    }


def test_layout_is_aligned_ordered_and_without_overlap():
    manifest = Manifest.of(odd_tensors())
    assert [e.name for e in manifest.entries] == list(odd_tensors())
    end = 0
    for entry in manifest.entries:
        assert entry.offset % ALIGNMENT_BYTES == 0
        assert end <= entry.offset < end + ALIGNMENT_BYTES
        end = entry.offset + entry.n_bytes
    assert manifest.n_bytes == end


def test_views_have_the_tensors_dtypes_and_shapes_and_share_the_payload():
    tensors = odd_tensors()
    manifest = Manifest.of(tensors)
    payload = torch.zeros(manifest.n_bytes, dtype=torch.uint8)
    views = manifest.views(payload)
    for name, view in views.items():
        view.copy_(tensors[name])
    for name, view in manifest.views(payload.clone()).items():
        assert view.dtype == tensors[name].dtype and view.shape == tensors[name].shape
        assert torch.equal(view.float(), tensors[name].float())


def test_tied_tensors_are_laid_out_once_and_lookalikes_are_not_taken_for_tied():
    weight = torch.randn(4, 4)
    tensors = {
        "embed": weight,
        "head": weight,
        "transposed": weight.T,
        "row": weight[0],
        "twin": weight.clone(),
    }
    assert [e.name for e in Manifest.of(tensors).entries] == ["embed", "transposed", "row", "twin"]
    assert list(LocalWeights(0, tensors).tensors()) == ["embed", "transposed", "row", "twin"]


def test_a_tied_model_is_laid_out_by_first_names(make_qwen3):
    state = make_qwen3(tie=True).state_dict()
    names = [e.name for e in Manifest.of(state).entries]
    assert "lm_head.weight" in state and "lm_head.weight" not in names
    assert set(state) - set(names) == {"lm_head.weight"}


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_a_notice_travels_in_a_message_header(codec):
    notice = WeightNotice(3, "/dev/shm/x-1", Manifest.of(odd_tensors()), (1, 2**32 - 1), 0.25)
    assert codec.decode(codec.encode(notice), type=WeightNotice) == notice


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("bool"), "bool bool[3] is missing"),
        (lambda t: t.update(new=torch.zeros(2)), "new float32[2] is new"),
        (lambda t: t.update(bool=torch.zeros(3)), "bool bool[3] has become bool float32[3]"),
        (lambda t: t.update(bf16=t.pop("bf16")), "another order"),
    ],
)
def test_the_difference_of_two_layouts_is_named(change, words):
    tensors = odd_tensors()
    before = Manifest.of(tensors)
    assert before.difference(Manifest.of(tensors)) is None
    change(tensors)
    assert words in before.difference(Manifest.of(tensors))


def test_a_dtype_that_this_torch_lacks_is_named():
    manifest = Manifest((TensorEntry("layer.weight", "float3", (2,), 0, 1),), 1)
    with pytest.raises(WeightsError, match=r"layer\.weight.*float3"):
        manifest.views(torch.zeros(1, dtype=torch.uint8))


def test_tensors_without_memory_of_their_own_are_told_apart_as_objects():
    """As under ZeRO 3, where a rank holds none of a parameter between two passes."""
    a, b = torch.empty(0), torch.empty(0)
    assert list(untied({"a": a, "tied": a, "b": b})) == ["a", "b"]
