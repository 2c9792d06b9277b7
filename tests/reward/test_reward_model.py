"""Reward models: how they read a pair, and that batches, padding and dtypes change no score."""

import pytest
import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from asyncrl.config import RewardModelConfig
from asyncrl.errors import RunFailed
from asyncrl.reward.model import load_scorer
from asyncrl.reward.template import UnreadablePairError, pair_ids
from asyncrl.tiny.tokenizer import byte_tokenizer

PAIRS = [("hi", "x"), ("sort dca", "acd"), ([{"role": "user", "content": "why?"}], "because " * 20)]


def scorer(folder, **settings):
    return load_scorer(RewardModelConfig(path=str(folder), **{"dtype": "float32"} | settings))


@pytest.mark.parametrize("pad", [True, False])
def test_scores_are_the_models_own_whatever_is_in_the_batch(tmp_path, make_reward_model, pad):
    """Also where the model knows no padding token."""
    folder = make_reward_model(tmp_path / "judge", pad=pad)
    judge = scorer(folder)
    pairs = [judge.tokens(prompt, response) for prompt, response in PAIRS]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    alone = [model(torch.tensor([ids])).logits.item() for ids in pairs]
    assert len(set(alone)) == 3
    assert judge.score(pairs) == pytest.approx(alone, abs=1e-4)
    assert [judge.score([ids])[0] for ids in pairs] == pytest.approx(alone, abs=1e-6)


def test_a_pair_that_ends_with_the_padding_token_is_read_to_its_end(tmp_path, make_reward_model):
    """As with the many models whose padding token is their end of sequence."""
    folder = make_reward_model(tmp_path / "judge", pad=False)
    judge = scorer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    end = byte_tokenizer(512).eos_token_id
    pairs = [[5, 6, 7, end], [8, end], [9, 10, 0]]
    alone = [model(torch.tensor([ids])).logits.item() for ids in pairs]
    judge._model.config.pad_token_id = end
    assert judge.score(pairs) == pytest.approx(alone, abs=1e-4)


def test_a_model_that_caps_its_attention_scores_by_capped_ones(tmp_path, make_reward_model):
    """transformers' `sdpa`, its default, leaves the cap out."""
    folder = make_reward_model(tmp_path / "judge")  # for its tokenizer
    torch.manual_seed(0)
    config = tiny_config("gemma2")
    config.num_labels, config.vocab_size = 1, len(byte_tokenizer(512))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    judge = scorer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    pairs = [judge.tokens(prompt, response) for prompt, response in PAIRS]
    alone = [model(torch.tensor([ids])).logits.item() for ids in pairs]
    assert judge.score(pairs) == pytest.approx(alone, abs=1e-4)
    assert judge._model.config._attn_implementation == "eager"


def test_bfloat16_scores_are_not_rounded_to_bfloat16(tmp_path, make_reward_model):
    folder = make_reward_model(tmp_path / "judge")
    exact = scorer(folder)
    rough = scorer(folder, dtype="bfloat16")
    pairs = [exact.tokens("p", "a" * n) for n in range(1, 9)]
    scores = torch.tensor(rough.score(pairs))
    torch.testing.assert_close(scores, torch.tensor(exact.score(pairs)), atol=0.2, rtol=0.1)
    assert (scores != scores.bfloat16().float()).any()


def test_the_template_writes_every_special_token_once():
    """The tokenizer would put a beginning of sequence before what begins with one already."""
    tokenizer = byte_tokenizer(512)
    start = "<|im_start|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids(start)
    text = tokenizer.decode(pair_ids(tokenizer, "hi", "ho"))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"


def test_conversations_are_read_whole():
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = byte_tokenizer(512).decode(pair_ids(byte_tokenizer(512), prompt, "ho"))
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, make_reward_model):
    judge = scorer(make_reward_model(tmp_path / "judge"))
    with pytest.raises(UnreadablePairError, match="has 1018 tokens, but the model has only 512 positions"):
        judge.tokens("p", "x" * 996)
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UnreadablePairError, match="rejects the conversation: no system role"):
        pair_ids(tokenizer, "hi", "ho")


def test_a_model_without_its_head_is_refused(tmp_path, make_reward_model):
    folder = make_reward_model(tmp_path / "judge")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "score" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(RunFailed, match=r"reward model `judge` .*its files lack score.weight"):
        scorer(folder)


def test_a_batch_that_does_not_fit_is_scored_in_halves(tmp_path, make_reward_model, monkeypatch):
    from asyncrl.reward import model as module

    judge = scorer(make_reward_model(tmp_path / "judge"))
    pairs = [judge.tokens("p", "a" * n) for n in range(1, 6)]
    whole = judge.score(pairs)
    fits = module.pooled_logits

    def two_at_most(model, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return fits(model, batch)

    monkeypatch.setattr(module, "pooled_logits", two_at_most)
    assert judge.score(pairs) == pytest.approx(whole, abs=1e-4)
