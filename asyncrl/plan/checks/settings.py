"""The single checks of the preflight. Each raises a `ConfigError` that names key, value and remedy."""

from __future__ import annotations

import ipaddress
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from asyncrl.cluster.hosts.base import find_host, visible_gpu
from asyncrl.config import Config, RewardJudgeConfig
from asyncrl.config.reward import INITIAL
from asyncrl.curriculum.own import GIVEN, named_choices
from asyncrl.data.prompts import PromptSet
from asyncrl.data.rows import is_on_hub, read_rows, told
from asyncrl.data.tokenise import AddedTokens
from asyncrl.decoders.facts import ModelFacts
from asyncrl.decoders.linear_layers import choose_layers
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.packages import need
from asyncrl.paths import nearest_folder
from asyncrl.plan.facts.model import find_policy
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.machine import Machine
from asyncrl.plan.outline import Outline
from asyncrl.plan.resources import Placement
from asyncrl.resolve import resolve
from asyncrl.reward.route import RouteError, scoring_parts
from asyncrl.reward_models.initial import judge_config
from asyncrl.roles import ROLLOUT, TRAINER
from asyncrl.rollout.engines.spec import EngineSpec, engine_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.specs import those
from asyncrl.trainer.backend import backend_of
from asyncrl.units import format_bytes
from asyncrl.weights.transport import find_transport
from asyncrl.wire.rpc import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def role_host(config: Config) -> None:
    """What is to start the processes can be imported."""
    find_host(config.run.role_host)


def transport(config: Config, nodes: int) -> None:
    """What is to carry the weights can be imported, and gets to every node."""
    find_transport(config.transport)
    if nodes > 1 and config.weights_stay_here:
        raise ConfigError(
            f"weights.transport={config.transport} is the memory of one machine, and the run is spread over "
            f"{nodes} nodes; use weights.transport=tcp, or leave it out"
        )


def mapped_gpus(config: Config, placement: Placement) -> None:
    """Every engine can map the memory of the trainer's GPU, where versions are to lie there."""
    is_on_gpu = any(place.gpus for place in placement.of(TRAINER))
    if config.transport == "ipc" and is_on_gpu and not all(place.gpus for place in placement.of(ROLLOUT)):
        raise ConfigError(
            f"weights.transport=ipc: versions lie on the trainer's GPU, and engines (rollout.engine="
            f"{config.rollout.engine}) have none to map it for; use weights.transport=shm, or leave it out"
        )


def trackers(config: Config) -> None:
    """What the run is to be shown by is installed, or can be imported."""
    for name, factory in config.observe.factories.items():
        if name == factory:
            resolve(name, what="observe.trackers")
        else:
            need(name, f"observe.trackers: {name}", "leave it out")


def metrics_port(config: Config) -> None:
    """The newest numbers can be served where they should."""
    if config.observe.metrics_port:
        from asyncrl.observe.prometheus import check_port

        check_port(config.observe.metrics_port)


def reward_routes(config: Config, needs: Mapping[str, Sequence[str]], prompts: PromptSet) -> bool:
    """Every row is scored by something, and has the columns that the functions and judges that score it
    cannot do without (where they are known): then True.

    needs: those columns of each function.
    """
    wanted = {
        f.label: (
            f"reward function `{f.function}`",
            [n for n in needs.get(f.function, ()) if n not in f.arguments],
        )
        for f in config.reward.functions
    } | {judge.label: (f"the judge `{judge.label}`", judge.needed_columns) for judge in config.reward.judges}
    seen = set()
    for row in prompts:
        try:
            names = scoring_parts(config.reward, row.columns)
        except RouteError as error:
            raise ConfigError(f"usable row {row.index} of the dataset: {error}; correct either") from None
        columns = frozenset(row.columns)
        if (columns, *names) in seen:
            continue
        seen.add((columns, *names))
        for part, needed in (wanted[name] for name in names if name in wanted):
            if missing := [name for name in needed if name not in columns]:
                raise ConfigError(
                    f"{part}: it needs the column `{missing[0]}`, which usable row "
                    f"{row.index} of the dataset has not; it has {', '.join(sorted(columns)) or 'no other'}"
                )
    return True


def choices(config: Config, needs: Mapping[str, Sequence[str]], prompts: PromptSet) -> None:
    """Every row has the columns that a user's own functions that choose cannot do without.

    needs: as of `reward_routes`.
    """
    for key, spec in named_choices(config).items():
        for row in prompts:
            known = [*GIVEN[key], *sorted(row.columns)]
            if missing := [name for name in needs.get(spec, ()) if name not in known]:
                raise ConfigError(
                    f"{key} `{spec}`: it needs `{missing[0]}`, which usable row {row.index} of the dataset "
                    f"has not; it is given {', '.join(known)}"
                )


def reference_answers(config: Config, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every row has a reference answer whose probability can be asked for, and it is known where it goes."""
    likelihood = config.reward.likelihood
    if likelihood is None:
        return
    from asyncrl.reward.likelihood import mark_of  # imports transformers

    mark_of(likelihood, config.reward, tokenizer)
    for row in prompts:
        answer = row.columns.get(likelihood.column)
        if answer is None or not tokenizer(str(answer), add_special_tokens=False)["input_ids"]:
            raise ConfigError(
                f"reward.likelihood.column={likelihood.column}: usable row {row.index} of the dataset has no "
                f"reference answer there; its columns: {', '.join(sorted(row.columns)) or 'none'}"
            )


def enough_rows(config: Config, usable: Sequence[int]) -> int:
    """Rows that are left to train on when those held out of each dataset are taken away."""
    data = config.data
    for dataset, rows in zip(data.datasets, usable, strict=True):
        if rows <= data.held_out_rows:
            which = f" {dataset.path}" * bool(data.mix)
            raise ConfigError(
                f"data.held_out_rows={data.held_out_rows}: the dataset{which} has {rows} usable rows, so "
                "none would be left to train on; hold out fewer"
            )
    trained = sum(usable) - data.held_out_rows * len(usable)
    if trained < config.epoch_multiple:
        raise ConfigError(
            f"data.drop_last=true: the {trained:,} rows to train on do not fill one batch "
            f"(trainer.batch_groups={config.trainer.batch_groups}), so an epoch would be empty; use "
            "data.drop_last=false, which fills a batch from the next epoch, or a smaller batch"
        )
    return trained


def network(config: Config) -> None:
    """The coordinator can listen where it should, encrypted, and so can a gateway."""
    host = config.network.bind
    if config.rollout.gateway:
        need("aiohttp", "rollout.gateway=true")
    if not zmq.has("curve"):
        raise ConfigError(
            "this build of ZeroMQ cannot encrypt (it lacks CURVE), and every run needs it; install the "
            "wheel of pyzmq: pip install --force-reinstall --only-binary :all: pyzmq"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"network.bind={host}: this machine cannot listen there ({error.strerror}); give one of its own "
            "addresses, or leave it out"
        ) from None


def engine(config: Config, placement: Placement) -> None:
    """The engine is installed, and can be as it is set, on the device that the engines compute on."""
    engine_of(config).check_device(config, placement.of(ROLLOUT)[0].device)


def decoding(config: Config, model: ModelFacts | None) -> str | None:
    """What to know of how the engine decodes the model, if anything."""
    return None if model is None else engine_of(config).look_at_decoding(config, model)


def adapted_layers(config: Config, models: KnownModels) -> None:
    """The models that are trained have the linear layers that are to be adapted."""
    lora = config.trainer.lora
    for name, model in {"policy": models.policy, "critic": models.critic}.items():
        if lora is None or model is None:
            continue
        try:
            choose_layers(model.linear_layers, lora.targets)
        except ValueError as error:
            raise ConfigError(f"trainer.lora.targets={lora.targets}: of the {name}: {error}") from None


def tensor_parallel(config: Config, model: ModelFacts | None) -> None:
    """Each rank of an engine gets whole heads."""
    size = config.rollout.tensor_parallel_size
    if model is not None and model.layer.heads % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size={size}: the model's {model.layer.heads} heads cannot be dealt to "
            f"so many ranks; use a divisor of {model.layer.heads}"
        )


def family(config: Config, placement: Placement) -> None:
    """The engine computes the policy right, and can be given new weights of it."""
    try:
        structure = find_policy(config.model).config
    except NotHereError:
        return  # told where the models are looked for
    engine_of(config).check_model(config, structure, placement.of(ROLLOUT)[0].device)


def stop_tokens(config: Config, model: ModelFacts | None) -> None:
    """The model can sample the tokens that are to end a response."""
    unknown = [i for i in config.rollout.stop_token_ids if model is not None and i >= model.vocab_size]
    if model is not None and unknown:
        raise ConfigError(
            f"rollout.stop_token_ids={config.rollout.stop_token_ids}: the model {config.model.path} never "
            f"samples {', '.join(map(str, unknown))}, because it has only the tokens 0 to "
            f"{model.vocab_size - 1:,}; leave these out, or give its own"
        )


def kept_sets(config: Config, model: ModelFacts | None) -> None:
    """A group can be handed in with what each of its tokens was sampled among, however long it becomes."""
    rollout = config.rollout
    if model is None or rollout.top_p < 1 or not engine_of(config).tells_kept or config.run.in_one_process:
        return
    listed = max(0, min(rollout.top_k, model.vocab_size - rollout.top_k))
    size = rollout.group_size * rollout.max_new_tokens * listed * 4
    if size > MAX_FRAME_BYTES:
        raise ConfigError(
            f"rollout.top_k={rollout.top_k}: with the {listed:,} ids that tell what each token was sampled "
            f"among, a group may have {format_bytes(size)}, and at most {format_bytes(MAX_FRAME_BYTES)} can "
            "be sent; use a smaller top_k, or none (rollout.top_k=0)"
        )


def dataset(config: Config) -> bool:
    """The datasets are on this machine, or can be fetched: then True."""
    for data in (each for whole in (config.data, *config.scored_data) for each in whole.datasets):
        if is_on_hub(data):
            need("datasets", f"{data.key}={data.path}", f"name a file: {data.key}=FILE.jsonl")
        else:
            read_rows(data)
    return True


def evaluation(config: Config) -> None:
    """There is an engine that can have a version of its own to score, and there are versions."""
    if config.evaluation is None:
        return
    if not backend_of(config).computes:
        raise ConfigError(
            f"evaluation scores versions, and trainer.backend={config.trainer.backend} makes none; leave "
            "`evaluation` out"
        )
    engine_of(config).for_evaluation(config)


def trainer(config: Config) -> None:
    """What the trainer's backend needs is installed, and there is a policy to train."""
    backend = backend_of(config)
    if config.rollout.temperature == 0 and backend.computes:
        raise ConfigError(
            "rollout.temperature=0: greedy responses are not samples of a distribution, so there are no "
            "log-probabilities to train by; use a temperature above 0"
        )
    backend.check_installed()


def visible_gpus(config: Config, placement: Placement) -> None:
    """The trainer's backend can compute on its GPUs."""
    names = [visible_gpu(gpu) for place in placement.of(TRAINER) if not place.node for gpu in place.gpus]
    backend_of(config).check_gpus(names)


def ranks(config: Config, placement: Placement) -> None:
    """The trainer's ranks can be where they are."""
    backend_of(config).check_nodes(config, [place.node for place in placement.of(TRAINER)])


def initial_judge(config: Config, judge: RewardJudgeConfig, key: str) -> None:
    """The run's engine can be the judge."""
    if judge.is_initial and not engine_of(config).may_stay_initial:
        able = those(EngineSpec, lambda spec: spec.may_stay_initial)
        raise ConfigError(
            f"{key}={judge.model}: rollout.engine={config.rollout.engine} computes no initial model in a "
            f"process of the run; use {able}, or serve the model beside the run, and name its server (url)"
        )


def initial_judge_fits(config: Config, model: ModelFacts | None, prompts: PromptSet) -> None:
    """The model knows every position of the longest question that it may be asked as a judge."""
    if model is None or model.max_positions is None or not any(j.is_initial for j in config.reward.judges):
        return
    own, question = judge_config(config, prompts.longest_tokens)
    if (context := own.rollout.context_tokens(question)) > model.max_positions:
        raise ConfigError(
            f"reward.judges with model={INITIAL}: a question of the longest prompt and full responses has up "
            f"to {question} tokens, which with a reply of {own.rollout.max_new_tokens} makes {context}, over "
            f"the {model.max_positions} positions of the model {config.model.path}; lower "
            "rollout.max_new_tokens or the judges' body.max_tokens, show them fewer responses (asks=score or "
            "pairs), or serve another judge beside the run (url)"
        )


def servers(config: Config, prompts: PromptSet) -> None:
    """What is to compute elsewhere for the engine answers, and can be used."""
    structure = find_policy(config.model).config
    engine_of(config).check_servers(config, structure, prompts.longest_tokens)


def budget(config: Config, placement: Placement) -> None:
    """A budget of GPU hours needs GPUs that spend it."""
    if config.run.gpu_hours is not None and not placement.gpus:
        raise ConfigError(
            f"run.gpu_hours={config.run.gpu_hours:g}: this run holds no GPU, so it spends none; set "
            "run.steps instead"
        )


def attention(config: Config, placement: Placement) -> None:
    """The trainer's attention kernel runs where the trainer runs."""
    name, on_gpu = config.model.attn_implementation, bool(placement.of(TRAINER)[0].gpus)
    setting, other = f"model.attn_implementation={name}", "model.attn_implementation=sdpa"
    if name == "varlen" and on_gpu and config.model.dtype == "float32":
        raise ConfigError(
            f"{setting}: on a GPU it computes in 16 bits only; use model.dtype=bfloat16, or {other}"
        )
    if name != "flash_attention_2":
        return
    if not on_gpu:
        raise ConfigError(f"{setting}: it needs a GPU, and the trainer has none; use {other}")
    need("flash_attn", setting, f"use {other}")


def prompts_fit(config: Config, model: ModelFacts | None, prompts: PromptSet) -> None:
    """The model knows every position and every token that it will be given."""
    if model is None:
        return
    longest, new = prompts.longest_tokens, config.rollout.max_new_tokens
    if (context := config.rollout.max_sequence_tokens) is not None:
        if context <= longest:
            raise ConfigError(
                f"rollout.max_sequence_tokens={context}: the longest prompt alone has {longest} tokens; use "
                f"{longest + 1} at least, or a lower data.max_prompt_tokens with data.on_bad_row=skip"
            )
        if model.max_positions is not None and context > model.max_positions:
            raise ConfigError(
                f"rollout.max_sequence_tokens={context} is over the {model.max_positions} positions of the "
                f"model {config.model.path}; use {model.max_positions} at most"
            )
    elif model.max_positions is not None and longest + new > model.max_positions:
        room = model.max_positions - longest
        remedy = f"at most rollout.max_new_tokens={room}, or " if room > 0 else ""
        raise ConfigError(
            f"rollout.max_new_tokens={new}: after the longest prompt ({longest} tokens) this makes "
            f"{longest + new}, over the {model.max_positions} positions of the model {config.model.path}; "
            f"use {remedy}a lower data.max_prompt_tokens with data.on_bad_row=skip"
        )
    largest = max(int(row.prompt_ids.max()) for row in prompts)
    if largest >= model.vocab_size:
        raise ConfigError(
            f"model.path={config.model.path}: its tokenizer gives the token id {largest}, but the model "
            f"knows only {model.vocab_size} tokens; the tokenizer is another model's"
        )


def warnings(config: Config, implied: Outline) -> Iterator[str]:
    """What works but may surprise, wherever the run runs."""
    if implied.slots > implied.max_responses_outstanding:
        yield (
            f"only {implied.max_responses_outstanding} of {implied.slots} slots can be in use: no more "
            f"responses may be outstanding with a staleness of at most {config.staleness.bound}"
        )
    for model in config.reward.models:
        if model.gate is not None and not model.sigmoid and (model.clip is None or model.clip[0] < 0):
            yield (
                f"reward model `{model.label}` counts only where `{model.gate}` is above 0, and its "
                "scores may be negative: a response that passes may then earn less than one that fails; set "
                "its `sigmoid: true`, or a `clip` from 0 on"
            )
    if config.rollout.truncation and not engine_of(config).tells_kept:
        yield (
            f"{config.rollout.truncation} renormalises what is sampled from over tokens that "
            f"rollout.engine={config.rollout.engine} does not tell, and the trainer's policy is not cut: "
            "ratios come out low even on policy"
        )
    for key, guests in config.guests.items():
        if guests and ipaddress.ip_address(config.network.bind).is_loopback:
            yield (
                f"{key}={guests}: network.bind={config.network.bind} is reached by no other machine, "
                "so others can join from this one alone; set network.bind to an address that they reach"
            )
    objective, reference = config.objective, config.reference
    if objective.advantage == "grpo" and reference is not None and reference.where == "reward":
        yield (
            f"objective.advantage={objective.advantage} divides by each group's deviation: where all "
            "responses earn the same, reference.where=reward leaves the KL penalty as the only difference, "
            "blown up to full-size advantages; use reference.where=loss, or objective.advantage=rloo"
        )
    group_tokens = config.rollout.group_size * config.rollout.max_new_tokens
    if config.trainer.batch_tokens is not None and config.trainer.batch_tokens < group_tokens:
        yield (
            f"trainer.batch_tokens={config.trainer.batch_tokens:,} is less than one group of long responses "
            f"has ({group_tokens:,} tokens): steps may come down to a single group, and few are sampled ahead"
        )
    if config.trainer.warmup_steps >= config.run.steps:
        yield f"trainer.warmup_steps={config.trainer.warmup_steps} does not end in {config.run.steps} steps"


def machine_warnings(machine: Machine, implied: Outline) -> Iterator[str]:
    """What works but may surprise on this machine."""
    if implied.threads > machine.cores:
        yield (
            f"{implied.threads} computing threads on {machine.cores} cores; lower trainer.threads, "
            "rollout.threads or rollout.workers"
        )
    needed = implied.host_memory_bytes
    if needed is not None and needed > machine.memory_bytes:
        yield (
            f"about {format_bytes(needed)} of memory are needed and the machine has "
            f"{format_bytes(machine.memory_bytes)}; lower rollout.slots or trainer.micro_batch_tokens"
        )


def disk_warnings(config: Config, implied: Outline) -> Iterator[str]:
    """Whether the run directory's disk has room for the checkpoints, those included that the run has."""
    run_dir = Path(config.run.dir or config.run.root).expanduser()
    folder, there = nearest_folder(run_dir), RunDir(run_dir).checkpoints
    free = shutil.disk_usage(folder).free
    taken = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    if implied.disk is not None and implied.disk.total_bytes > free + taken:
        yield (
            f"checkpoints take about {format_bytes(implied.disk.total_bytes)}, and the disk of {folder} has "
            f"{format_bytes(free)} free; choose another place (run.dir), or keep fewer (checkpoint.keep_last)"
        )


def prompt_warnings(config: Config, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What works but may surprise about the dataset and its tokens."""
    if prompts.skipped:
        count = len(prompts.skipped)
        yield f"{count:,} bad row{'s' * (count > 1)} of {told(config.data)} skipped"
    texts = [prompt for row in prompts if isinstance(prompt := row.prompt, str)]
    if texts:
        yield from _text_warnings(texts, tokenizer)
    if config.data.chat_template_kwargs and len(texts) == len(prompts):
        yield "data.chat_template_kwargs: no prompt is a conversation, so no chat template uses them"
    if tokenizer.eos_token_id is None and not config.rollout.stop_token_ids:
        yield (
            "neither the tokenizer nor rollout.stop_token_ids names a token that ends a response: all will "
            f"have {config.rollout.max_new_tokens} tokens"
        )


def _text_warnings(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the tokenizer would put around texts, and what becomes of it."""
    added = AddedTokens.of(tokenizer)
    if added.after:
        yield (
            f"the tokenizer ends a text with {tokenizer.decode(added.after)!r}; prompts go without it, since "
            "the model is to go on"
        )
    start = tokenizer.decode(added.before) if added.before else ""
    if start and (rendered := sum(text.startswith(start) for text in texts)):
        yield f"{rendered:,} prompts begin with {start!r} already and get no second one"
