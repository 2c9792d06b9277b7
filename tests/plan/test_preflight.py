"""What is found wrong before anything starts, on real models, tokenizers, datasets and reward functions."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny, tiny_config
from tokenizers.processors import TemplateProcessing

from asyncrl.config import from_tree
from asyncrl.errors import ConfigError
from asyncrl.plan import disk
from asyncrl.plan.checks import settings as checks
from asyncrl.plan.facts.footprint import floats
from asyncrl.plan.facts.model import FoundModel, ModelSource, find_policy, model_facts
from asyncrl.plan.machine import Machine
from asyncrl.plan.preflight import preflight
from asyncrl.plan.resources import Place, Placement, assign
from asyncrl.rollout.engines.torch.row_decoder import cache_name
from asyncrl.tiny.tokenizer import byte_tokenizer

REWARDS = """\
def length(completions, **columns):
    return [float(len(c)) for c in completions]

def right(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]
"""


@pytest.fixture
def run(tmp_path, make_qwen3, monkeypatch):
    """A small run on files of its own: `run(section={key: value})` is its config, `run.path` its folder."""
    monkeypatch.chdir(tmp_path)
    make_qwen3(vocab_size=259).save_pretrained("model")
    byte_tokenizer(2048).save_pretrained("model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def config(**sections):
        tree = {
            "run": {"root": "runs"},
            "model": {"path": "model"},
            "data": {"path": "rows.jsonl"},
            "reward": {"functions": [{"function": "rewards.py:right"}]},
            "rollout": {"group_size": 4, "max_new_tokens": 32, "device": "cpu"},
            "trainer": {"device": "cpu"},
        }
        for name, settings in sections.items():
            tree[name] = {**tree.get(name, {}), **settings}
        return from_tree(tree)

    config.path = tmp_path
    return config


def refusal(config, gpus=None) -> str:
    with pytest.raises(ConfigError) as caught:
        preflight(config, gpus)
    return str(caught.value)


def test_an_address_of_another_machine_is_refused(run):
    assert "network.bind=192.0.2.1: this machine cannot listen there" in refusal(
        run(network={"bind": "192.0.2.1"})
    )


def test_a_run_that_can_start_is_prepared_and_nothing_is_written(run):
    before = sorted(run.path.rglob("*"))
    prepared = preflight(run())
    assert len(prepared.prompts) == 50
    policy = prepared.models.policy
    assert policy.parameters == 259 * 64 + 80320 - 97 * 64
    assert policy.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, head size, float32
    assert policy.max_positions == 2048
    assert [place.device for place in prepared.placement.places] == ["cpu", "cpu"]
    assert prepared.outline.rows == 50
    assert [p for p in sorted(run.path.rglob("*")) if "__pycache__" not in p.parts] == before


def test_the_parameter_count_is_that_of_the_loaded_model(run):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained("model")
    assert model_facts(find_policy(run().model), "float32").parameters == sum(
        p.numel() for p in loaded.parameters()
    )


def test_a_model_that_decodes_a_request_at_a_time_is_told_of_and_gets_no_cuda_graphs(run):
    tiny("qwen3_5_text").config.save_pretrained("model")
    config = run(data={"max_prompt_tokens": 32}, rollout={"torch": {"cuda_graphs": True}})
    facts = model_facts(find_policy(config.model), "float32")
    with pytest.raises(
        ConfigError, match=r"rollout\.torch\.cuda_graphs=true: Qwen3_5ForCausalLM keeps a recur"
    ):
        checks.decoding(config, facts)
    assert "a request at a time: Qwen3_5" in checks.decoding(run(), facts)
    assert checks.decoding(run(rollout={"engine": "vllm"}), facts) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_family_keeps_of_a_sequence_is_what_its_cache_holds(family):
    """Of keys, values and states, at any length that no window has outgrown."""
    source = ModelSource("model.path", family, False, "")
    facts = model_facts(FoundModel(source, None, tiny_config(family)), "float32")
    with torch.no_grad():
        model = tiny(family)
        cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True)[cache_name(model)]
    held = sum(tensor.numel() for layer in cache.layers for tensor in floats(vars(layer)))
    assert held == 5 * facts.kv_bytes_per_token // 4 + facts.state_values


def test_all_independent_faults_are_reported_at_once(run):
    message = refusal(
        run(model={"path": "./none"}, reward={"functions": [{"function": "rewards.py:rigth"}]}), gpus=999
    )
    assert "--gpus 999" in message
    assert "did you mean `right`?" in message
    assert "model.path=./none" in message


@pytest.mark.parametrize("path", ["./models/none", "model/none", "none/of/these"])
def test_a_model_path_that_is_not_there(path, run):
    message = refusal(run(model={"path": path}))
    assert f"model.path={path}: there is no folder {run.path}" in message
    assert f"`asyncrl tiny-model {path}`" in message


def test_a_model_folder_that_is_a_file_or_empty_or_broken(run):
    assert "this is a file, not a model's folder" in refusal(run(model={"path": "rows.jsonl"}))
    (run.path / "model/config.json").write_text("{")
    assert "its config.json cannot be used" in refusal(run())
    (run.path / "model/config.json").unlink()
    assert "the folder holds no Hugging Face model (no config.json in it)" in refusal(run())


def test_a_model_that_is_no_decoder_only_language_model(run):
    from transformers import BertConfig, T5Config

    for config, kind in (
        (T5Config(), "t5"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    ):
        config.save_pretrained(f"other-{kind}")
        assert f"{kind} is not a decoder-only language model" in refusal(run(model={"path": f"other-{kind}"}))


def test_a_model_folder_without_weights(run):
    (run.path / "model/model.safetensors").unlink()
    assert "the folder has a config.json but no weights" in refusal(run())
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (run.path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    (run.path / "model/model-1.safetensors").touch()
    assert "1 of its weight files are missing (model-2.safetensors" in refusal(run())


def test_a_model_folder_without_a_tokenizer(run):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run.path / "model" / name).unlink(missing_ok=True)
    assert "model.path=model: no tokenizer could be loaded from it: the folder has none of" in refusal(run())


def test_conversations_and_a_tokenizer_without_a_chat_template(run):
    tokenizer = byte_tokenizer(2048)
    tokenizer.chat_template = None
    (run.path / "model/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained("model")
    assert "the tokenizer of model has no chat template" in refusal(run())


def test_a_tokenizer_of_another_model(run, make_qwen3):
    make_qwen3(vocab_size=97).save_pretrained("model")
    assert "gives the token id 258, but the model knows only 97 tokens" in refusal(run())


def test_a_teacher_or_reference_that_reads_other_tokens(run):
    """It has as many, and would read another text than was sampled; one of them may differ."""
    shutil.copytree("model", "other")
    file = run.path / "other/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]

    def write(ids):
        content["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
        file.write_text(json.dumps(content))

    ids = list(vocabulary.values())
    write([ids[1], ids[0], *ids[2:]])
    assert preflight(run(teacher={"path": "other"}))
    write([*ids[1:], ids[0]])
    for name, advice in (("teacher", "leave the section teacher out"), ("reference", "leave reference.path")):
        message = refusal(run(**{name: {"path": "other"}}))
        assert f"{name}.path=other: its tokenizer is another: {len(ids):,} of the policy's" in message
        assert advice in message
    file.unlink()
    assert preflight(run(teacher={"path": "other"})), "weights alone say nothing of texts"


def test_prompt_and_response_over_the_model_s_positions(run):
    longest = max(len(row.prompt_ids) for row in preflight(run()).prompts)
    room = 2048 - longest
    preflight(run(rollout={"max_new_tokens": room}))
    message = refusal(run(rollout={"max_new_tokens": room + 1}))
    assert message.startswith(f"rollout.max_new_tokens={room + 1}: ")
    assert f"use at most rollout.max_new_tokens={room}, or" in message


def test_stop_tokens_that_the_model_never_samples(run):
    assert preflight(run(rollout={"stop_token_ids": [0, 258]}))
    message = refusal(run(rollout={"stop_token_ids": [258, 259, 70000]}))
    assert message.startswith("rollout.stop_token_ids=[258, 259, 70000]: the model model never samples 259, ")
    assert "70000, because it has only the tokens 0 to 258;" in message


def test_kept_sets_that_make_a_group_too_large_to_send(run):
    """Of 259 tokens, 129 are listed at most: those that top-k keeps, or those that it leaves out."""
    large = {"group_size": 300, "max_new_tokens": 1800}
    message = refusal(run(rollout={"top_k": 129, **large}))
    assert message.startswith(
        "rollout.top_k=129: with the 129 ids that tell what each token was sampled among"
    )
    assert "use a smaller top_k, or none" in message
    for fits in ({"top_k": 129, **large, "group_size": 8}, {"top_k": 140, **large}, large):
        assert preflight(run(rollout=fits))


def test_a_dataset_that_is_not_there(run):
    assert "data.path=none.jsonl: there is no such file" in refusal(run(data={"path": "none.jsonl"}))


def test_reward_functions_that_cannot_be_imported(run):
    functions = [{"function": "no.such.module:f"}]
    assert "reward function `no.such.module:f`" in refusal(run(reward={"functions": functions}))


@pytest.mark.slow
def test_what_is_wrong_with_an_objective_of_ones_own_is_found(run):
    source = "def loss(tokens, *, beta, gamma=1.0): ...\ndef advantage(outcomes, *, alpha=1.0): ..."
    (run.path / "own.py").write_text(source)
    loss, advantage = {"policy_loss": "own.py:loss"}, {"advantage": "own.py:advantage"}
    assert "objective.policy_loss `own.py:lost`: " in refusal(run(objective={"policy_loss": "own.py:lost"}))
    assert "`beta` has no default; set objective.settings.beta" in refusal(run(objective=loss))
    message = refusal(run(objective=loss | advantage | {"settings": {"beta": 1.0, "bets": 2.0}}))
    assert "objective.settings.bets: own.py:loss and own.py:advantage have no such setting" in message
    assert "there are beta, gamma, alpha" in message
    assert preflight(run(objective=loss | advantage | {"settings": {"beta": 1.0, "alpha": 2.0}}))


def test_a_reward_function_that_needs_a_column_which_a_row_has_not(run):
    with (run.path / "rows.jsonl").open("a") as file:
        file.write('\n{"prompt": "no answer here"}')
    message = refusal(run())
    assert "reward function `rewards.py:right`: it needs the column `answer`, which usable row 50" in message
    assert preflight(run(reward={"functions": [{"function": "rewards.py:length"}]}))


def test_choices_of_ones_own_that_need_what_they_are_not_given(run):
    source = "def keep(rewards, level): ...\ndef share(rate): ...\ndef pick(rewards, size, answer): ..."
    (run.path / "own.py").write_text(source)
    message = refusal(
        run(
            objective={"filter": "own.py:keep"},
            data={"curriculum": {"sampler": "own.py:share"}},
            rollout={"candidates": 9, "choose": "own.py:pick"},
        )
    )
    told = "which usable row 0 of the dataset has not; it is given"
    assert f"objective.filter `own.py:keep`: it needs `level`, {told} rewards, tokens, answer" in message
    assert preflight(run(rollout={"candidates": 9, "choose": "own.py:pick"}))


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "ledger.db"])
def test_a_run_directory_that_holds_a_run(file, run):
    (run.path / "mine").mkdir()
    (run.path / "mine/notes.txt").touch()
    preflight(run(run={"dir": "mine"}))
    (run.path / "mine" / file).touch()
    assert f"run.dir=mine: this folder already holds a run ({file})" in refusal(run(run={"dir": "mine"}))


def test_a_run_directory_that_cannot_be_made(run, monkeypatch):
    assert "run.root=rows.jsonl/runs: " in refusal(run(run={"root": "rows.jsonl/runs"}))
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    message = refusal(run(run={"dir": str(run.path / "new")}))
    assert f"run.dir={run.path}/new: cannot write to {run.path} (no permission)" in message


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere shared memory has no limit of its own")
def test_shared_memory_too_small_for_two_versions(run):
    config = run()
    model = model_facts(find_policy(config.model), "float32")
    needed = 2 * 4 * model.parameters
    machine = Machine(cores=1, memory_bytes=10**12, gpu_bytes=(), shared_memory_bytes=needed)
    disk.shared_memory_has_room(config, model, machine, on_gpu=True)
    with pytest.raises(ConfigError, match=r"/dev/shm has .* free; make it larger .*--shm-size=2g"):
        disk.shared_memory_has_room(
            config, model, replace(machine, shared_memory_bytes=needed - 1), on_gpu=True
        )
    # What stays on the trainer's GPU needs none, wherever there is one.
    machine, config = replace(machine, shared_memory_bytes=0), run(weights={"transport": "ipc"})
    disk.shared_memory_has_room(config, model, machine, on_gpu=True)
    with pytest.raises(ConfigError, match=r"weights\.transport=ipc\), take .* has .* free; make it larger"):
        disk.shared_memory_has_room(config, model, machine, on_gpu=False)


def test_flash_attention_without_gpu_or_package(run, monkeypatch):
    config = run(
        model={"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}, trainer={"device": "auto"}
    )
    with pytest.raises(ConfigError, match="it needs a GPU, and the trainer has none"):
        checks.attention(config, assign(config, None, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package flash-attn"):
        checks.attention(config, assign(config, None, 1))


def test_varlen_attention_on_a_gpu_is_for_16_bits(run):
    for dtype, gpus in (("float32", 0), ("bfloat16", 0), ("bfloat16", 1)):
        config = run(model={"attn_implementation": "varlen", "dtype": dtype}, trainer={"device": "auto"})
        checks.attention(config, assign(config, None, gpus))
    config = run(model={"attn_implementation": "varlen", "dtype": "float32"}, trainer={"device": "auto"})
    with pytest.raises(ConfigError, match=r"16 bits only; use model\.dtype=bfloat16"):
        checks.attention(config, assign(config, None, 1))


def test_what_may_surprise_is_warned_of(run):
    with (run.path / "rows.jsonl").open("a") as file:
        file.write("\nbad")
    config = run(
        run={"steps": 5},
        data={"on_bad_row": "skip"},
        rollout={"threads": 500, "slots": 200},
        trainer={"warmup_steps": 5, "batch_groups": 8, "batch_tokens": 10},
        staleness={"max_staleness": 1},
        reference={"where": "reward"},
    )
    warnings = "\n".join(preflight(config).warnings)
    assert "1 bad row of rows.jsonl skipped" in warnings
    assert "501 computing threads on" in warnings
    assert "only 64 of 200 slots can be in use" in warnings
    assert "trainer.warmup_steps=5 does not end in 5 steps" in warnings
    assert "objective.advantage=grpo divides by each group's deviation" in warnings
    assert "trainer.batch_tokens=10 is less than one group of long responses has" in warnings
    assert len(preflight(config).warnings) == 6


def test_a_plain_run_gives_no_warning(run):
    prepared = preflight(run(rollout={"slots": 16}))
    config, implied = prepared.config, prepared.outline
    assert not list(checks.warnings(config, implied))
    tokenizer = byte_tokenizer(2048)
    assert not list(checks.prompt_warnings(config, prepared.prompts, tokenizer))
    roomy = replace(prepared.machine, cores=64, memory_bytes=10**12)
    assert not list(checks.machine_warnings(roomy, implied))
    (small,) = checks.machine_warnings(replace(roomy, memory_bytes=10**6), implied)
    assert "of memory are needed and the machine has 1.0 MB" in small
    tokenizer.eos_token = None
    (no_end,) = checks.prompt_warnings(config, prepared.prompts, tokenizer)
    assert "names a token that ends a response" in no_end


def test_what_a_tokenizer_adds_to_texts_is_told(run):
    (run.path / "texts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 3)
    adding = byte_tokenizer(2048)
    ids = {token: adding.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=list(ids.items())
    )
    config = run(data={"path": "texts.jsonl", "chat_template_kwargs": {"enable_thinking": False}})
    assert list(checks.prompt_warnings(config, preflight(config).prompts, adding)) == [
        "the tokenizer ends a text with '<|im_end|>'; prompts go without it, since the model is to go on",
        "data.chat_template_kwargs: no prompt is a conversation, so no chat template uses them",
    ]
    (run.path / "texts.jsonl").write_text('{"prompt": "<|im_start|>1+1", "answer": "2"}\n' * 3)
    warnings = list(checks.prompt_warnings(config, preflight(config).prompts, adding))
    assert "3 prompts begin with '<|im_start|>' already and get no second one" in warnings


def judged(**model):
    """A reward section with a function and a reward model in the folder `judge`."""
    return {
        "functions": [{"function": "rewards.py:right"}],
        "models": [{"path": "judge", "device": "cpu"} | model],
    }


def test_a_run_with_a_reward_model_is_prepared_without_its_weights(run, make_reward_model):
    make_reward_model("judge")
    (run.path / "judge/model.safetensors").write_bytes(b"not looked into")
    prepared = preflight(run(reward=judged(threads=2)))
    (place,) = prepared.placement.of("reward-0")
    assert (place.device, place.threads) == ("cpu", 2)
    assert ("reward-0", 1, 2) in [(p.role, p.count, p.threads) for p in prepared.outline.processes]
    (memory,) = [m for m in prepared.outline.memory if m.kind == "reward-0"]
    parameters = 259 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32 + 32
    assert memory.parts["weights"] == 2 * parameters  # bfloat16


def test_reward_models_that_give_no_score(run, make_reward_model):
    key = "reward.models.0.path=judge"
    assert f"{key[:-5]}./judge: there is no folder" in refusal(run(reward=judged(path="./judge")))
    make_reward_model("judge", labels=3)
    message = refusal(run(reward=judged()))
    assert f"{key}: it has 3 outputs, but a reward model has one; give a folder with" in message
    assert "`asyncrl train-reward`" in message
    assert "reward.models.0.path=model: Qwen3ForCausalLM gives no score" in refusal(
        run(reward=judged(path="model"))
    )
    make_reward_model("judge")
    (run.path / "judge/model.safetensors").unlink()
    assert f"{key}: the folder has a config.json but no weights" in refusal(run(reward=judged()))


def test_a_reward_model_that_cannot_be_made_is_refused_in_words(run, make_reward_model):
    make_reward_model("judge")
    path = run.path / "judge/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 0}))
    assert "reward.models.0.path=judge: its config.json" in refusal(run(reward=judged()))


def test_a_reward_model_whose_tokenizer_has_no_chat_template(run, make_reward_model):
    make_reward_model("judge")
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = None
    (run.path / "judge/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained("judge")
    message = refusal(run(reward=judged()))
    assert message.startswith("reward.models.0.path=judge: its tokenizer has no chat template")
    assert "put the chat_template.jinja that it was trained with into the folder" in message


def test_every_missing_model_is_reported_after_what_to_do_in_few_lines(run):
    models = [{"path": f"no/such/one-{i}"} for i in range(4)]
    lines = refusal(run(model={"path": "./none"}, reward={"functions": [], "models": models})).split("\n")
    assert lines[0].startswith("to do first: model.path=FOLDER, or a name on the hub; reward.models.0.path=")
    assert [line.partition(":")[0] for line in lines[1:4]] == [
        "- model.path=./none",
        "- reward.models.0.path=no/such/one-0",
        "- reward.models.1.path=no/such/one-1",
    ]
    assert len(lines) == 5
    assert "reward.models.2.path=no/such/one-2: there is no folder" in lines[4]
    assert "reward.models.3.path=no/such/one-3: there is no folder" in lines[4]


def test_a_question_to_the_initial_policy_that_it_cannot_read(run):
    def judged(**judge):
        return {"functions": [], "judges": [{"model": "initial", "body": {"max_tokens": 8}, **judge}]}

    message = refusal(run(reward=judged()))  # the model has 2048 positions
    assert "reward.judges with model=initial" in message and "over the 2048 positions" in message
    assert "asks=score" in message
    message = refusal(run(reward=judged(), rollout={"engine": "paced"}, trainer={"backend": "paced"}))
    assert "reward.judges.0.model=initial: rollout.engine=paced computes no initial model" in message


def test_prompts_that_a_reward_model_cannot_read(run, make_reward_model):
    key = "reward.models.0.path=judge"
    make_reward_model("judge")
    message = refusal(run(reward=judged(), rollout={"max_new_tokens": 500}))
    assert f"{key}: usable row" in message
    assert "over the model's 512 positions" in message
    picky = byte_tokenizer(512)
    picky.chat_template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}x"
    picky.save_pretrained("judge")
    preflight(run(reward=judged()))
    message = refusal(run(reward=judged(), data={"system_prompt": "be brief"}))
    assert f"{key}: its chat template rejects the conversation: no system role" in message
    assert "usable row 0" in message


def test_rows_without_a_route_to_a_reward(run, make_reward_model):
    make_reward_model("judge")
    styles = [{"style": style} for style in ("model", "rule", "both")]
    rows = [{"prompt": f"{i}", "reward_model": style} for i, style in enumerate(styles)]
    rows[1]["answer"] = "1"
    (run.path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = {"model": ["judge"], "rule": ["right"]}
    reward = judged() | {"route": {"column": "reward_model.style", "parts": parts}}
    message = refusal(run(reward=reward))
    assert "usable row 2 of the dataset: its `reward_model.style` is 'both', which reward.route" in message
    assert "does not list (it has model, rule)" in message
    parts["both"] = ["judge"]
    assert preflight(run(reward=reward)), "the rows that are for the model need no column `answer`"
    parts["both"] = ["right"]
    assert "needs the column `answer`, which usable row 2 of" in refusal(run(reward=reward))


def test_a_judge_needs_its_key_its_prompt_and_its_columns(run, monkeypatch):
    pytest.importorskip("aiohttp")
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m"}

    def of(**settings):
        return run(reward={"judges": [judge | settings]})

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "judges.0.api_key_env=NO_SUCH_KEY: there is no such" in refusal(of(api_key_env="NO_SUCH_KEY"))
    assert "reward.judges.0.prompt=none.jinja: there is no such file" in refusal(of(prompt="none.jinja"))
    (run.path / "ask.jinja").write_text("{{ answer }}")
    assert "names `answer`; there are prompt, responses" in refusal(of(prompt="ask.jinja"))
    (run.path / "ask.jinja").write_text("{{ row.answer }}{% if %}")
    assert "is no Jinja template" in refusal(of(prompt="ask.jinja"))
    assert "the judge `m`: it needs the column `good`" in refusal(of(reference_column="good"))
    (run.path / "ask.jinja").write_text("{{ row.answer }}")
    prepared = preflight(of(prompt="ask.jinja", reference_column="answer"))
    assert str(run.path / "ask.jinja") in prepared.user_files.digests
    assert prepared.config.reward.judges[0].prompt == str(run.path / "ask.jinja")


def test_answers_alone_can_be_read_only_where_thinking_is_marked(run):
    assert "reward.thinking=[<think>, </think>]" in refusal(run(reward={"sees": "answer"}))
    assert preflight(run(reward={"sees": "answer", "thinking": ["(", ")"]}))


def test_a_likelihood_needs_a_mark_and_a_reference_answer_in_every_row(run):
    def of(**settings):
        return run(reward={"likelihood": settings})

    assert "reward.likelihood: neither the model's tokenizer" in refusal(of())
    assert "column=solution: usable row 0 of the dataset has no" in refusal(of(mark="", column="solution"))
    assert preflight(of(mark="</a>"))


def test_demonstrations_are_read_before_anything_starts_and_known_again(run):
    (run.path / "sft.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    path = str(run.path / "sft.jsonl")
    assert "usable row 1: no text in the column `response`" in refusal(run(sft={"path": path}))
    skipping = preflight(run(sft={"path": path}, data={"on_bad_row": "skip"}))
    assert path in skipping.user_files.digests


def test_a_gate_on_scores_that_may_be_negative_is_warned_of(run, make_reward_model):
    make_reward_model("judge")

    def warned(**model):
        warnings = preflight(run(rollout={"slots": 16}, reward=judged(gate="right", **model))).warnings
        return any("a response that passes may then earn less than one that fails" in w for w in warnings)

    assert warned()
    assert not warned(sigmoid=True)
    assert not warned(clip=[0.0, 5.0])


@pytest.mark.parametrize("group_size", [1, 4])
def test_greedy_responses_cannot_be_trained_on(run, group_size):
    sections = {"rollout": {"temperature": 0.0, "group_size": group_size}}
    if group_size == 1:
        sections["objective"] = {"advantage": "reinforce_pp"}
        assert "rollout.temperature=0: greedy responses are not samples of a" in refusal(run(**sections))
    else:
        with pytest.raises(ConfigError, match="samples the same response for the whole group"):
            run(**sections)


def test_gpus_that_deepspeed_cannot_read_the_names_of(run, monkeypatch):
    config = run(trainer={"backend": "deepspeed", "device": "auto"}, rollout={"device": "cpu"})
    placement = assign(config, None, 2)
    checks.visible_gpus(config, placement)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    checks.visible_gpus(config, placement)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1")
    with pytest.raises(ConfigError, match="DeepSpeed reads numbers there only; name the GPUs by those that"):
        checks.visible_gpus(config, placement)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0},
        {"num_attention_heads": "many"},
        {"hidden_size": -64},
        {"rope_parameters": {"rope_type": "odd"}},
    ],
)
def test_a_config_that_makes_no_model_is_refused_in_words(run, change):
    path = run.path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "model.path=model: its config.json" in refusal(run())


def test_an_index_that_says_nothing_is_refused_in_words(run):
    (run.path / "model" / "model.safetensors.index.json").write_text('{"weight_map"')
    assert "model.safetensors.index.json does not list the weight files" in refusal(run())


def test_layers_that_cannot_be_adapted(run):
    message = refusal(run(trainer={"lora": {"targets": ["q_proj", "gate_up_proj"]}}))
    assert "of the policy: the model has no linear layer `gate_up_proj`" in message
    assert "it has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_heads_that_cannot_be_dealt_to_the_ranks_of_an_engine(run):
    config = run(rollout={"engine": "vllm", "tensor_parallel_size": 3})
    facts = model_facts(find_policy(config.model), "float32")
    with pytest.raises(ConfigError, match="the model's 4 heads cannot be dealt to so many ranks"):
        checks.tensor_parallel(config, facts)


ROUTED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    ("family", "changes", "device", "says"),
    [
        ("gpt_oss", {}, "cuda", "gpt_oss: vLLM loads its experts around its own reloading"),
        ("gpt_oss", {}, "cpu", "rollout.engine=torch"),
        ("ernie4_5_moe", {}, "cpu", "leaves out the correction bias"),
        ("ernie4_5_moe", {}, "cuda", None),
        ("deepseek_v3", ROUTED, "cpu", "computes something else"),
        ("deepseek_v3", ROUTED, "cuda", None),
        ("deepseek_v3", {}, "cuda", '"topk_method": "noaux_tc"'),
        *((family, {}, "cpu", None) for family in ("mixtral", "qwen3_moe", "glm4_moe", "olmoe", "phi")),
    ],
)
def test_families_that_vllm_computes_wrongly_are_refused_with_the_reason(run, family, changes, device, says):
    structure = tiny_config(family)
    for name, value in changes.items():
        setattr(structure, name, value)
    structure.save_pretrained(run.path / "model")
    config = run(rollout={"engine": "vllm", "device": device})
    gpus = (0,) if device == "cuda" else ()
    placement = Placement((Place("rollout-0", device, gpus, threads=1),))
    if says is None:
        checks.family(config, placement)
        return
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        checks.family(config, placement)
    assert "rollout.engine=vllm: model.path=model is of the family" in str(caught.value)


@pytest.mark.parametrize("engine", ["http", "torch"])
def test_servers_are_refused_what_no_vllm_can_be_given_and_the_embedded_engine_is_not(run, engine):
    tiny_config("gpt_oss").save_pretrained(run.path / "model")
    http = (
        {"http": {"urls": ["http://127.0.0.1:1"], "weights_dir": str(run.path)}} if engine == "http" else {}
    )
    config = run(rollout={"engine": engine, **http})
    placement = assign(config, None, 0)
    if engine == "torch":
        checks.family(config, placement)
    else:
        with pytest.raises(ConfigError, match="gpt_oss"):
            checks.family(config, placement)
