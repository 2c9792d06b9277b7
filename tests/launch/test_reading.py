"""Prompts that a process of its own reads beside the other checks: what comes of it is what `load_prompts`
gives."""

import os

import pytest

from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import ConfigError
from asyncrl.launch import reading


def prompts_of(config):
    with reading.reading_beside(config) as load:
        return load(config.data, load_tokenizer(config.model))


def test_it_gives_what_is_read_here(make_config, monkeypatch):
    config = make_config()
    here = load_prompts(config.data, load_tokenizer(config.model))
    monkeypatch.setattr(reading, "load_prompts", lambda *_: pytest.fail("read once more"))
    monkeypatch.setattr(reading, "_encoded", encoded_elsewhere)
    assert prompts_of(config).encoded() == here.encoded()


def encoded_elsewhere(config, here=os.getpid()):
    assert os.getpid() != here
    return load_prompts(config.data, load_tokenizer(config.model)).encoded()


def test_what_is_wrong_is_told_from_here(make_config, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ConfigError, match="no column `prompt`"):
        prompts_of(make_config(f"data.path={tmp_path / 'bad.jsonl'}"))


def dies(config):
    os._exit(7)


def test_its_death_costs_nothing_but_time(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr(reading, "_encoded", dies)
    assert prompts_of(config).encoded() == load_prompts(config.data, load_tokenizer(config.model)).encoded()


def of_others(config):
    return PromptSet(()).encoded()


def test_other_datasets_are_read_here(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr(reading, "_encoded", of_others)
    assert len(prompts_of(config)) == 0
    with reading.reading_beside(config) as load:
        other = make_config("data.max_prompt_tokens=77").data
        assert len(load(other, load_tokenizer(config.model))) > 0
