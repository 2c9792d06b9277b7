"""Where a reference answer takes the place of a response's own."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from asyncrl.core.records import FinishReason, Trajectory, VersionSpan
from asyncrl.reward.likelihood import ReferenceNotes

WORDS = ["<eos>", *"abc<>/=4 ", "</think>", "<ans", ">4", "an"]
IDS = {word: i for i, word in enumerate(WORDS)}
MERGES = [("a", "n"), (">", "4")]


@pytest.fixture
def tokenizer():
    vocabulary = IDS | {"n": len(IDS), "s": len(IDS) + 1}
    inner = Tokenizer(models.BPE(vocabulary, MERGES, unk_token=None))
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["</think>"]})
    return fast


def noted(tokenizer, mark, words, end="", answer="4", shown=()):
    """kept (of the response), and tail, answer and mark as texts. shown: which of the words were."""
    ids = [IDS["b"], IDS["a"], *(IDS[word] for word in words)]
    mask = np.array([i >= 2 and i - 2 not in shown for i in range(len(ids))])
    spans = tuple(VersionSpan(int(at), 1, 0) for at in np.flatnonzero(mask))
    sampled = Trajectory(
        np.array(ids, np.int32), mask, np.zeros(len(ids), np.float32), spans, FinishReason.STOP
    )
    notes = ReferenceNotes(tokenizer, "answer", mark, end, {IDS["<eos>"]})({"answer": answer}, sampled)
    if not notes:
        return None
    found = notes["reference"]
    texts = (tokenizer.decode(found[part]) for part in ("tail", "answer", "mark"))
    return found["kept"] - 2, *texts


@pytest.mark.parametrize(
    ("mark", "words", "found"),
    [
        ("</think>", ["a", "</think>", "b", "<eos>"], (2, "", "4", "</think>")),
        ("</think>", ["a", "</think>", "b", "</think>"], (2, "", "4", "</think>")),  # the first
        ("</think>", ["a", "b", "<eos>"], None),  # cut off, or never done
        ("", ["a", "b", "<eos>"], (2, "", "4", "")),
        ("", ["a", "b"], (2, "", "4", "")),
        ("a=", ["b", "a", "=", "b"], (3, "", "4", "a=")),
        ("<ans>", ["b", "<ans", ">", "4"], (3, "", "4", "<ans>")),
        ("<ans>", ["b", "<ans", ">4"], (2, ">", "4", "<ans>")),  # the mark's end was sampled with the answer
    ],
)
def test_the_answer_follows_the_mark_and_what_was_sampled_before_it_stays(tokenizer, mark, words, found):
    assert noted(tokenizer, mark, words) == found


def test_what_is_written_after_the_reference_counts_with_it(tokenizer):
    assert noted(tokenizer, "</think>", ["</think>", "a"], end="</", answer=44) == (1, "", "44</", "</think>")


def test_of_an_episode_the_last_turn_has_the_answer(tokenizer):
    """And not what it was shown, nor what it thought about a tool."""
    words = ["a", "</think>", "b", "=", "</think>", "c", "</think>", "4"]
    assert noted(tokenizer, "</think>", words, shown=(3, 4)) == (7, "", "4", "</think>")
    assert noted(tokenizer, "</think>", words[:6], shown=(3, 4)) is None, "it has not come to an answer"
    assert noted(tokenizer, "", words, shown=(3, 4)) == (8, "", "4", "")
