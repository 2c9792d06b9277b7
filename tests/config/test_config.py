"""Settings: what is read, what is refused, and whether the refusal helps."""

import math
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.cli.config_docs import meanings
from asyncrl.config import (
    Config,
    ObjectiveConfig,
    ReferenceConfig,
    Section,
    dump,
    from_tree,
    keys,
    load,
    section_of,
    yaml_tree,
)
from asyncrl.config.messages import OF_PEERS
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.objective.catalogue import (
    AGGREGATIONS,
    GROUP_ADVANTAGES,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    PROXIMALS,
)

MINIMAL = """\
model:
  path: models/m
data:
  path: rows.jsonl
reward:
  functions:
    - function: my.rewards:right
    - function: my/rewards.py:short
      weight: 0.5
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_a_config_error_is_an_asyncrl_error_and_a_value_error():
    assert issubclass(ConfigError, AsyncRLError)
    assert issubclass(ConfigError, ValueError)


def test_defaults_fill_what_the_file_leaves_out(config_file):
    config = load(config_file())
    assert config.model.path == "models/m"
    assert config.staleness.max_staleness == 4
    assert [f.weight for f in config.reward.functions] == [1.0, 0.5]


def test_overrides_are_yaml_values(config_file):
    config = load(
        config_file(),
        [
            "run.seed=7",
            "trainer.lr=1e-4",
            "objective.behavior_cap=.inf",
            "objective.clip_eps_low=null",
            "run.dir=",
            "data.shuffle=false",
            "trainer.betas=[0.8, 0.9]",
            "data.system_prompt=Think, then answer",
            "rollout.paced.step_base_s=0",
        ],
    )
    assert (config.run.seed, config.trainer.lr, config.run.dir) == (7, 1e-4, None)
    assert (config.objective.behavior_cap, config.objective.clip_eps_low) == (math.inf, None)
    assert config.data.shuffle is False
    assert config.trainer.betas == (0.8, 0.9)
    assert config.data.system_prompt == "Think, then answer"
    assert config.rollout.paced.step_base_s == 0


def test_overrides_reach_into_lists_and_replace_whole_ones(config_file):
    config = load(config_file(), ["reward.functions.1.weight=2", "reward.functions.0.name=r"])
    assert [(f.name, f.weight) for f in config.reward.functions] == [("r", 1.0), (None, 2.0)]
    config = load(config_file(), ["reward.functions=[{function: 'a:b'}]", "reward.functions.0.weight=3"])
    assert [(f.function, f.weight) for f in config.reward.functions] == [("a:b", 3.0)]


def test_overrides_of_sections_that_the_file_leaves_empty_or_out(config_file):
    config = load(
        config_file(MINIMAL + "staleness:\n"), ["staleness.max_staleness=1", "weights.ack_timeout_s=5"]
    )
    assert (config.staleness.max_staleness, config.weights.ack_timeout_s) == (1, 5.0)


def test_a_section_whose_keys_are_all_commented_out_has_its_defaults(config_file):
    config = load(config_file(MINIMAL + "trainer:\n  # lr: 1.0\nrollout:\n  paced:\n"))
    assert config == load(config_file())


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("staleness.max_stalness=2", "`staleness.max_staleness`"),
        ("max_staleness=2", "`staleness.max_staleness`"),
        ("stalenes.max_staleness=2", "`staleness`"),
        ("rollout.temprature=1", "`rollout.temperature`"),
        ("rollout.paced.step=1", "`rollout.paced.step_base_s`"),
        ("reward.functions.1.weigth=1", "`reward.functions.1.weight`"),
        ("trainer.max_staleness=1", "`staleness.max_staleness`"),
        ("lr=1", "`trainer.lr` or `critic.lr`"),
        ("trainer.learning_rate=1", "`trainer.lr`"),
        ("rollout.n=8", "`rollout.group_size`"),
        ("workers=1", "`rollout.workers` or `reward.workers` or `evaluation.workers`"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(override, nearest, config_file):
    message = refusal(config_file(), override)
    key = override.partition("=")[0]
    shown = "stalenes" if key.startswith("stalenes.") else key
    assert message == f"the command line: unknown key `{shown}`; did you mean {nearest}?"


def test_what_peers_call_otherwise_is_there():
    assert {*OF_PEERS.values()} <= {*keys()} and not {*OF_PEERS} & {k.rpartition(".")[2] for k in keys()}


def test_an_unknown_key_that_resembles_nothing_is_refused_with_what_is_valid_there(config_file):
    assert refusal(config_file(), "checkpoint.xyzzy=1").endswith(
        "unknown key `checkpoint.xyzzy`; valid here: every_steps, keep_last, keep_best, best_of"
    )


def test_every_wrong_key_of_the_file_is_reported_with_the_file(config_file):
    path = config_file(MINIMAL + "trainer: {lr: fast, epz: 1}\nrun: {mode: sync}\n")
    assert sorted(refusal(path, "run.seed=x").split("\n")) == sorted(
        [
            f"{path}: `run.mode` is 'sync'; valid: 'async' or 'inline'",
            f"{path}: `trainer.lr` is the text 'fast'; it should be a valid number",
            f"{path}: unknown key `trainer.epz`; did you mean `trainer.eps`?",
            "the command line: `run.seed` is the text 'x'; it should be a valid integer",
        ]
    )


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.seed=1.5", "`run.seed` is 1.5; it should be a valid integer"),
        ("run.seed=-1", "`run.seed` is -1; it should be greater than or equal to 0"),
        ("run.seed.x=1", "`run.seed` is {'x': 1}; it should be a valid integer"),
        ("run.name=12", "`run.name` is the number 12; it should be text: write '\"12\"'"),
        (
            "run.name=a/../b",
            "`run.name` is 'a/../b'; give a name for a folder: up to 100 characters, no slashes, and no dot "
            "first",
        ),
        (
            "network.bind=localhost",
            "`network.bind` is 'localhost'; give an IP address of this machine, such as 127.0.0.1 or "
            "10.0.0.5",
        ),
        (
            "evaluation={every_steps: 1, suites: gsm8k}",
            "`evaluation.suites` is 'gsm8k'; it should be a list, [{key: value, ...}, ...], of sections with "
            "the keys name, path",
        ),
        ("run.name=true", "`run.name` is the boolean true; it should be text: write '\"true\"'"),
        ("model.path=", "`model.path` is null; it should be a valid string"),
        ("data.shuffle=1", "`data.shuffle` is 1; it should be true or false"),
        ("data.shuffle=no", "`data.shuffle` is 'no'; it should be true or false"),
        ("trainer.lr=.inf", "`trainer.lr` is inf; it should be a finite number"),
        ("trainer.lr=.nan", "`trainer.lr` is nan; it should be a finite number"),
        ("trainer.lr=0", "`trainer.lr` is 0; it should be greater than 0"),
        ("trainer.betas=[0.9, 1]", "`trainer.betas.1` is 1; it should be less than 1"),
        (
            "rollout.stop_token_ids=[-1]",
            "`rollout.stop_token_ids.0` is -1; it should be greater than or equal to 0",
        ),
        ("staleness=2", "`staleness` is 2; it is a section with the keys max_staleness, on_stale, fixed_lag"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(override, complaint, config_file):
    assert refusal(config_file(), override) == f"the command line: {complaint}"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run", "cannot read `run`: write a setting as key.sub=value"),
        ("=3", "cannot read `=3`"),
        ("run..seed=3", "cannot read `run..seed=3`"),
        ("run.name=[a", "`run.name`: '[a' is not a YAML value, at 1:3: "),
        ("model.path.x=1", "`model.path` is the value 'models/m' in the config file, not a section"),
        ("reward.functions.x.weight=1", "`reward.functions` is a list: its items are numbered from 0"),
        (
            "reward.functions.2.weight=1",
            "`reward.functions` is a list of 2, numbered from 0: there is no item 2",
        ),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(override, complaint, config_file):
    assert complaint in refusal(config_file(), override)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run:\n  seed: 1\n  seed: 2\n", ":3:3: the key `seed` is already given in line 2"),
        ("run: {seed: 1\n", ":2:1: "),
        ("a: [1\n", ":2:1: "),
        ("- a\n", ": expected sections such as `model:` and `data:` at the top, found ['a']"),
        ("", ": expected sections such as `model:` and `data:` at the top, found nothing"),
        ("? [a, b]\n: 1\n", ":1:3: a key must be a word"),
        ("run: !!python/object/apply:os.system [ls]\n", ":1:6: could not determine a constructor"),
    ],
)
def test_a_broken_file_is_refused_with_line_and_column(text, complaint, config_file):
    path = config_file(text)
    assert refusal(path).startswith(f"{path}{complaint}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff}")
    assert "is not a text file in UTF-8" in refusal(tmp_path / "latin.yaml")


def test_missing_sections_are_named_with_their_keys(config_file):
    message = refusal(config_file("data: {path: x}\n"))
    assert "the section `model` is missing (its keys: path, dtype," in message
    assert "the section `reward` is missing (its keys: functions, models," in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("010", 10),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("no", "no"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("1e", "1e"),
        ("1__0", "1__0"),
        ("0x10", "0x10"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value, config_file):
    read = yaml_tree.read(config_file(f"a: {text}\n"))["a"]
    assert (read, type(read)) == (value, type(value))


def test_anchors_and_merges_work_and_may_override(config_file):
    tree = yaml_tree.read(config_file("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))
    assert tree == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "1e5",
        "no",
        "null",
        "010",
        "1:30",
        "true",
        "2026-01-31",
        "",
        " a",
        "<<",
        "=",
        "0x1f",
        "~",
        "1_0",
        ".inf",
    ]
)


@given(path=TEXTS.filter(bool), prompt=st.none() | TEXTS, seed=st.integers(0), lr=st.floats(1e-300, 1e300))
def test_a_dumped_config_reads_back_the_same(path, prompt, seed, lr, tmp_path_factory):
    config = from_tree(
        {
            "run": {"seed": seed},
            "model": {"path": "m"},
            "data": {"path": path, "system_prompt": prompt},
            "reward": {"functions": [{"function": "a:b"}]},
            "trainer": {"lr": lr},
        }
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


GREEDY = ["objective.advantage=remax", "rollout.choose=greedy_baseline"]
OVER_HTTP = ["rollout.engine=http", "rollout.http.urls=[http://a:1]", "rollout.http.weights_dir=/dev/shm/w"]


@pytest.mark.parametrize(
    ("overrides", "reason", "remedy"),
    [
        (["trainer.mini_batches=17"], "cannot split trainer.batch_groups=16", "lower mini_batches"),
        (["run.resume=auto"], "every start would begin another one", "run.dir=runs/mine"),
        (
            ["rollout.episode=asyncrl.rollout.adapters.verifiers:episode"],
            "asks the model over HTTP",
            "set rollout.gateway=true",
        ),
        (
            [
                *("rollout.episode=asyncrl.rollout.adapters.verifiers:episode", "rollout.gateway=true"),
                "data.hints={column: hint, train: with}",
            ],
            "so no hint would be seen",
            "leave them out",
        ),
        (["rollout.min_new_tokens=257"], "is over rollout.max_new_tokens=256", "lower it"),
        (["rollout.group_size=1"], "leaves nothing to compare", "use rollout.group_size >= 2"),
        (["rollout.group_size=1", "objective.advantage=pacs"], "nothing to compare", "group_size >= 2"),
        (
            [*OVER_HTTP, "rollout.top_p=0.9", "objective.policy_loss=topr"],
            "objective.policy_loss=topr weighs whole responses by their ratios, and rollout.top_p=0.9 renorm",
            "use rollout.top_p=1 and rollout.top_k=0, or rollout.engine=torch or rollout.engine=vllm",
        ),
        (
            [*OVER_HTTP, "rollout.top_k=20", "objective.step_size=vcpo"],
            "objective.step_size=vcpo weighs whole responses by their ratios, and rollout.top_k=20 renorm",
            "use rollout.top_p=1 and rollout.top_k=0, or rollout.engine=torch or rollout.engine=vllm",
        ),
        *(
            (
                [*OVER_HTTP, "rollout.top_k=20", f"objective.{chosen}", *more],
                f"objective.{chosen} weighs whole responses by their ratios, and rollout.top_k=20 renorm",
                "use rollout.top_p=1 and rollout.top_k=0, or rollout.engine=torch or rollout.engine=vllm",
            )
            for chosen, more in {
                "policy_loss=vespo": [],
                "policy_loss=a_lol": [],
                "advantage=opob": [],
                "behavior_level=sequence": [],
                "reject=sum_k2": ["objective.reject_above=1"],
            }.items()
        ),
        *(
            (
                ["reference.where=reward", f"objective.advantage={advantage}"],
                f"by which objective.advantage={advantage} tells success from failure",
                "use reference.where=loss",
            )
            for advantage in ("max_rl", "ngrpo", "nsr", "psr", "pacs", "pass_at_k")
        ),
        (
            ["reference.where=reward", "reference.ratio_cap=10"],
            "reference.ratio_cap=10.0 is for a KL in the loss",
            "leave it out",
        ),
        (
            ["teacher={path: t, form: exact, offload: true}"],
            "with teacher.form=exact the teacher computes beside the policy",
            "use teacher.form=sampled",
        ),
        (
            ["teacher.path=t", "objective.filter_constant_groups=true"],
            "groups teach by more than what is known",
            "leave the filter out",
        ),
        (
            ["reward.likelihood={}", "objective.filter_constant_groups=true"],
            "groups teach by more than what is known",
            "leave the filter out",
        ),
        (
            ["sft={path: t, choose: failed}", "objective.filter_constant_groups=true"],
            "sft.choose=failed is for groups in which every response has failed",
            "use sft.choose=all",
        ),
        (
            ["reward.judges=[{model: wise}]"],
            "reward.judges.0.url is missing: name the server that has reward.judges.0.model=wise",
            "reward.judges.0.model=initial for the initial policy",
        ),
        (
            ["reward.judges=[{model: initial}]", "run.mode=inline"],
            "reward.judges.0.model=initial is served by a process of its own, and run.mode=inline has none",
            "use run.mode=async",
        ),
        (["teacher={}"], "name the teacher either by teacher.path or", "teacher.endpoint"),
        (
            ["teacher.endpoint=http://h:1/v1", "rollout.temperature=0.7"],
            "teacher.endpoint=http://h:1/v1 gives probabilities at temperature 1",
            "use rollout.temperature=1",
        ),
        (
            ["teacher={endpoint: 'http://h:1/v1', form: exact}"],
            "teacher.endpoint=http://h:1/v1 tells of sampled tokens only",
            "use teacher.form=sampled, or teacher.path",
        ),
        (["data.hints={}"], "data.hints.column is missing", "or use data.hints.give=prefix"),
        (
            ["data.hints={give: prefix, share: [0.5, 1.0]}"],
            "data.hints.share=[0.5, 1.0]",
            "write two shares between 0 and 1, the lower one first",
        ),
        (
            ["data.hints={give: prefix}", "rollout.episode=a:b"],
            "data.hints.give=prefix: rollout.episode=a:b begins its own responses",
            "use data.hints.give=hint",
        ),
        (
            ["replay={}", "objective.filter_constant_groups=true"],
            "`replay` is for groups in which every response has failed",
            "leave one of them out",
        ),
        (
            ["replay={}", "rollout.group_size=2"],
            "replay.rare_below=0.25 of rollout.group_size=2 is less than one response",
            "use 0.5 or more, or larger groups",
        ),
        *(
            (
                ["reward=", taught, *asking],
                f"{key} goes by rewards, and nothing scores a response before it is trained on",
                "give reward.functions, or leave it out",
            )
            for taught, key, asking in (
                ("teacher.path=t", "data.hints", ["data.hints={column: hint}"]),
                ("reward.likelihood={}", "data.curriculum", ["data.curriculum={}"]),
                (
                    "reward.likelihood={}",
                    "rollout.choose=max_variance",
                    ["rollout.candidates=32", "rollout.choose=max_variance"],
                ),
                ("teacher.path=t", "rollout.choose=greedy_baseline", GREEDY),
                ("teacher.path=t", "sft.choose=failed", ["sft={path: t, choose: failed}"]),
                ("teacher.path=t", "replay", ["replay={}"]),
            )
        ),
        (["rollout.engine=vllm", "rollout.temperature=3"], "vLLM takes temperatures up to 2", "a lower one"),
        *(
            (
                ["objective.filter_constant_groups=true", f"objective.advantage={advantage}", *more],
                f"objective.advantage={advantage} learns from groups of equal rewards, too",
                "leave the filter out",
            )
            for advantage, more in {
                "ngrpo": [],
                "nsr": [],
                "reinforce_pp": [],
                "gae": ["critic.lr=1e-5"],
                "vtrace": ["critic.lr=1e-5"],
                "turn_grpo": ["rollout.episode=own.py:play"],
            }.items()
        ),
        (
            ["objective.filter_constant_groups=true", "rollout.group_size=1", "objective.advantage=nsr"],
            "every group of one (rollout.group_size=1) has equal rewards and would be dropped",
            "leave the filter out",
        ),
        (
            ["objective.filter_constant_groups=true", "reference.where=reward"],
            "with reference.where=reward equal rewards differ by their KL",
            "use reference.where=loss",
        ),
        (["network.bind=0.0.0.0"], "listens on every address", "set network.advertise"),
        (["rollout.guests=1", "run.mode=inline"], "run.mode=inline has one", "use run.mode=async"),
        (["reward.guests=1"], "there is no reward model to score by", "leave it out"),
        (["rollout.episode_guests=1"], "there is no rollout.episode to carry out", "leave it out"),
        (
            ["rollout.episode_guests=1", "rollout.episode=a:b", "run.mode=inline"],
            "rollout.episode_guests=1: others join a run of several processes, and run.mode=inline has one",
            "use run.mode=async",
        ),
        (
            ["rollout.guests=1", "network.bind=10.0.0.1", "weights.transport=shm"],
            "which weights.transport=shm does not reach",
            "use weights.transport=tcp",
        ),
        (
            ["objective.policy_loss=ppo", "objective.behavior_cap=3"],
            "objective.behavior_cap=3.0 is a setting of "
            "decoupled_ppo, tis, gspo, gmpo, clip_cov, kl_cov, sapo, and",
            "objective.policy_loss=ppo has clip_eps_low, clip_eps_high, dual_clip; "
            "objective.advantage=grpo has deviation",
        ),
        (
            ["objective.max_reward=2"],
            "is a setting of ngrpo, and not",
            "objective.advantage=grpo has deviation",
        ),
        (
            ["objective.policy_loss=my.losses:loss", "objective.clip_eps_low=0.1"],
            "not of what is chosen",
            "objective.policy_loss=my.losses:loss has settings",
        ),
        (
            ["objective.policy_loss=icepop", "objective.ratio_low=2", "objective.ratio_high=1"],
            "objective.ratio_low=2.0 is above objective.ratio_high=1.0",
            "no ratio lies between them",
        ),
        (
            ["objective.policy_loss=clip_cov", "objective.cov_low=2", "objective.cov_high=1"],
            "objective.cov_low=2.0 is above objective.cov_high=1.0",
            "no covariance lies between them",
        ),
        (
            ["objective.policy_loss=ppo", "objective.proximal=loglinear"],
            "objective.policy_loss=ppo has no proximal policy",
            "those that have: decoupled_ppo, tis, icepop, gspo, gmpo, clip_cov, kl_cov, sapo",
        ),
        *(
            (
                [f"objective.advantage={advantage}", *more],
                f"objective.advantage={advantage} is of an episode's turns",
                f"name an episode, or use objective.advantage={instead}",
            )
            for advantage, more, instead in (("turn_grpo", [], "grpo"), ("turn_gae", ["critic={}"], "gae"))
        ),
        (
            ["objective.advantage=turn_gae", "rollout.episode=own.py:play"],
            "objective.advantage=turn_gae takes its values from a critic",
            "critic: {}",
        ),
        (
            ["objective.advantage=turn_grpo", "rollout.episode=own.py:play", "objective.whiten=true"],
            "objective.whiten is for gae, vtrace, turn_gae",
            "leave it out",
        ),
        (
            [
                *("objective.advantage=turn_gae", "critic={}", "rollout.episode=own.py:play"),
                "objective.bootstrap_truncated=true",
            ],
            "objective.bootstrap_truncated is for gae, vtrace",
            "leave it out",
        ),
        (["reward.episode={won: {weight: 2}}"], "reward.episode says how", "name an episode by"),
        (
            ["rollout.episode=own.py:play", "reward.episode={won: {gate: right}, odd: {}}"],
            "reward.episode.won.gate=right: no other part of that name",
            "there are `odd`, `won`",
        ),
        (
            ["rollout.episode=own.py:play", "reward.episode={right: {}}"],
            "2 parts called `right`",
            "a `name` of its own",
        ),
        (
            ["objective.advantage=remax"],
            "compares with a greedy response",
            "set rollout.choose=greedy_baseline",
        ),
        (
            ["rollout.choose=greedy_baseline"],
            "samples the baseline of objective.advantage=remax",
            "set both or",
        ),
        *(
            ([*GREEDY, wrong], message, remedy)
            for wrong, message, remedy in (
                ("rollout.candidates=9", "none is left out", "leave this out"),
                (
                    "reward.functions=[{function: 'a:b', standardise: group}]",
                    "not standardised",
                    "leave `stand",
                ),
                ("reward.likelihood={}", "is of what is trained on, and not of it", "leave one of them out"),
                (
                    "objective.filter_constant_groups=true",
                    "learns from groups of equal rewards",
                    "leave the fil",
                ),
            )
        ),
        (["objective.entropy_target=0.2"], "objective.entropy_coef, which is 0", "set that, to 0.005 or so"),
        (["objective.entropy_step=0.01"], "is for objective.entropy_target, which is null", "leave it out"),
        (["objective.advantage=otb", "rollout.group_size=1"], "leaves nothing to compare", "group_size >= 2"),
        (["objective.ewma_decay=0.5"], "is for objective.proximal=ewma", "leave it out"),
        (["objective.ess_base=0.5"], "is for objective.step_size=vcpo", "leave it out"),
        (["objective.reject=mean_k1"], "would reject nothing", "objective.reject_above (nats)"),
        (["objective.reject_above=0.5"], "objective.reject leaves out", "one of sum_k1, sum_k2"),
        *(
            (
                [f"objective.reject={name}", "objective.reject_above=-0.1"],
                f"objective.reject_above=-0.1: objective.reject={name} is never below 0",
                "give a bound above 0",
            )
            for name in ("mean_k2", "sum_k3", "max_k2")
        ),
        (
            ["objective.reject=sum_k1", "objective.reject_above=-1", "objective.reject_below=1"],
            "objective.reject_below=1.0 is above objective.reject_above=-1.0",
            "every sequence would be rejected",
        ),
        (
            ["objective.advantage=pass_at_k", "objective.pass_k=8", "rollout.group_size=8"],
            "objective.pass_k=8 leaves one subset of rollout.group_size=8",
            "a larger group, or a smaller k",
        ),
        (["objective.settings.beta=1"], "an objective or advantage of your own", "set their own keys"),
        (["rollout.temperature=0"], "samples the same response", "use a temperature above 0"),
        *(
            (
                ["objective.advantage=max_rl", setting],
                f"{what} makes rewards negative, and objective.advantage=max_rl is for",
                "leave it out, or use objective.advantage=grpo",
            )
            for setting, what in (
                ("reward.overlong.buffer_tokens=2", "reward.overlong"),
                ("reward.format.pattern=a+", "reward.format"),
                ("reward.functions=[{function: 'a:b', standardise: group}]", "`standardise` of a part"),
            )
        ),
        (
            ["reference={where: reward, estimator: k3}"],
            "reference.estimator=k3 is for a KL in the loss",
            "leave it out",
        ),
        (
            ["objective.advantage=gae", "critic={value_range: [0, 2]}"],
            "is for critic.bins, which is null",
            "leave it out",
        ),
        *(
            (
                ["objective.proximal=behavior", f"objective.{setting}"],
                f"objective.{setting}: with objective.proximal=behavior the correction is 1",
                "leave it out",
            )
            for setting in ("behavior_cap=3.0", "behavior_level=geometric")
        ),
        (
            [
                *("rollout.temperature=0", "rollout.group_size=1", "rollout.candidates=4"),
                "objective.advantage=nsr",
            ],
            "samples the same response",
            "use a temperature above 0",
        ),
        (["staleness.fixed_lag=5"], "too old for staleness.max_staleness=4", "use staleness.max_staleness=5"),
        (
            ["staleness.fixed_lag=2", "staleness.on_stale=drop"],
            "has nothing to decide",
            "use staleness.on_stale=wait",
        ),
        (["run.mode=inline", "rollout.workers=2"], "has one engine", "use rollout.workers=1"),
        (["evaluation.every_steps=5"], "there is nothing to score", "or hold rows out (data.held_out_rows)"),
        (
            ["evaluation.every_steps=5", "evaluation.sets=[{path: a/x.jsonl}, {path: b/x.jsonl}]"],
            "evaluation.sets has 2 datasets called `x`",
            "give each a `name` of its own",
        ),
        (
            ["evaluation.every_steps=5", "evaluation.suites=[gsm8k, {name: gsm8k, path: x.jsonl}]"],
            "evaluation.suites: 2 of the sets that are scored are called `gsm8k`",
            "name the suite once",
        ),
        (
            ["evaluation={every_steps: 5, temperature: 0, samples: 4}", "data.held_out_rows=9"],
            "samples the same response 4 times",
            "use evaluation.samples=1",
        ),
        (
            ["evaluation={every_steps: 5, workers: 2}", "data.held_out_rows=9", "run.mode=inline"],
            "scores in its one process",
            "use evaluation.workers=1",
        ),
        (
            ["evaluation={every_steps: 5, patience: 2}", "data.held_out_rows=9"],
            "evaluation.patience=2 waits for a metric to rise, and none is named",
            "set checkpoint.best_of and checkpoint.keep_best=1",
        ),
        (
            [
                *("evaluation.every_steps=5", "data.held_out_rows=9", "reward.functions=[]"),
                "teacher.path=t",
            ],
            "evaluation.every_steps=5: nothing scores a response",
            "of weight 0 where they are not to be learnt from",
        ),
        (
            [
                *("evaluation={every_steps: 5, temperature: 0}", "data.held_out_rows=9"),
                "reward.judges=[{url: 'http://a:1/v1', model: m, asks: group}]",
            ],
            "one response to each prompt, and reward.judges.0.asks=group compares",
            "use evaluation.samples=2",
        ),
        (
            [
                *("evaluation.every_steps=5", "data.held_out_rows=9", "checkpoint.keep_best=1"),
                "checkpoint.best_of=eval/gsm8k/reward/mean",
            ],
            "evaluation has no such metric",
            "name one such as eval/held_out/reward/mean",
        ),
        (
            [
                *("evaluation.every_steps=5", "data.held_out_rows=9", "checkpoint.keep_best=1"),
                "checkpoint.best_of=eval/held_out/rewrd/mean",
            ],
            "evaluation has no such metric",
            "name one such as eval/held_out/reward/mean",
        ),
        (
            [
                *("evaluation.every_steps=5", "data.held_out_rows=9", "checkpoint.keep_best=1"),
                "checkpoint.best_of=eval/held_out/reward/shrot/mean",
            ],
            "the reward has no part called `shrot`",
            "name one of right, short, or no part for their sum",
        ),
        (
            [
                *("evaluation={every_steps: 5, samples: 6}", "data.held_out_rows=9"),
                *("checkpoint.keep_best=1", "checkpoint.best_of=eval/held_out/pass@8/mean"),
            ],
            "with 6 responses to a prompt, pass@k is known for k of 1, 2, 4",
            "or more evaluation.samples",
        ),
        (["checkpoint.best_of=reward/mean"], "checkpoint.keep_best=0 keeps none", "checkpoint.keep_best=1"),
        (
            ["checkpoint.best_of=reward/mean", "checkpoint.keep_best=1"],
            "is a metric of evaluation",
            "set evaluation.every_steps, too",
        ),
        (
            ["rollout.kv_on_update=resubmit"],
            "resubmit is for rollout.engine=vllm; rollout.engine=torch",
            "use rollout.kv_on_update=recompute",
        ),
        (["run.mode=inline", "rollout.engine=paced"], "cannot pace", "or run.mode=async"),
        (["trainer.backend=paced"], "trains no model", "use rollout.engine=paced"),
        (["model.attn_implementation=flash_attention_2"], "16 bits only", "model.dtype=bfloat16"),
        (
            ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16", "trainer.device=cpu"],
            "needs a GPU",
            "model.attn_implementation=sdpa",
        ),
        (["reward.functions.0.function=other:short"], "2 parts called `short`", "a `name` of its own"),
        (
            ["reward.functions.0.weight=0", "reward.functions.1.weight=0"],
            "every weight is 0",
            "give a function or model a weight",
        ),
        (["reward="], "nothing scores a response", "give reward.functions or reward.models"),
        (["reward.functions.0.clip=[1, -1]"], "reward.functions.0.clip=[1.0, -1.0]", "lower bound first"),
        (
            ["reward.functions.0.gate=right"],
            "no other reward function of that name",
            "there are `right`, `short`",
        ),
        (["reward.models=[{path: a/b, gate: b}]"], "reward.models.0.gate=b", "there are `right`, `short`"),
        (
            ["reward.models=[{path: a/b, share_gpu_with: rollout-1}]"],
            "reward.models.0.share_gpu_with=rollout-1: no such process",
            "there are `rollout-0`, `trainer`",
        ),
        (["reward.models=[{path: a/right}]"], "2 parts called `right`", "a `name` of its own"),
        (
            ["reward.route={column: kind, parts: {x: [rigth]}}"],
            "reward.route.parts.x: no function or model is called `rigth`",
            "there are `right`, `short`",
        ),
        (["reward.route.column=kind"], "reward.route.column=kind", "needs reward.route.parts"),
        (["reward.route.parts={x: [right]}"], "reward.route.parts", "needs reward.route.column"),
        (
            ["reward.overlong.buffer_tokens=300"],
            "reward.overlong.buffer_tokens=300 is longer than any response",
            "rollout.max_new_tokens=256",
        ),
        *(
            ([f"reward.judges=[{{url: {url}, model: m, {settings}}}]"], reason, remedy)
            for url, settings, reason, remedy in [
                ("'localhost:8'", "", "judges.0.url: 'localhost:8' is no http", "like http://HOST:PORT/v1"),
                ("'http://u:p@h/v1'", "", "has a user or password in it", "like http://HOST:PORT/v1"),
                ("'http://h/v1'", "api_key_env: sk-1", "is no name of an environment", "put the key itself"),
                ("'http://h/v1'", "scale: [1, 0]", "judges.0.scale=[1.0, 0.0]", "the worst mark first"),
                ("'http://h/v1'", "asks: criteria", "needs criteria", "or reward.judges.0.rubric_column"),
                ("'http://h/v1'", "opponents: 2", "is for reward.judges.0.asks=pairs", "leave it out"),
                ("'http://h/v1'", "reply_pattern: x", "has no group", "put parentheses"),
                ("'http://h/v1'", "marks: {Yes: 1}", "for the words that", "give that, too"),
            ]
        ),
        (["reward.format.pattern=(a"], "reward.format.pattern='(a'", "is not a regular expression"),
        (["trainer.lora={}", "objective.proximal=ewma"], "averages whole weights", "proximal=recompute"),
        (
            ["trainer={lora: {}, backend: deepspeed, deepspeed: {offload_optimizer: true}}"],
            "offload_optimizer cannot be with trainer.lora and trainer.deepspeed.zero_stage=2",
            "use trainer.deepspeed.zero_stage=3",
        ),
        (
            ["trainer={ranks: 2, backend: deepspeed, deepspeed: {hpz_partition_size: 2}}"],
            "hpz_partition_size=2 needs trainer.deepspeed.zero_stage=3, not 2",
            "whole weights on every rank",
        ),
        (
            ["trainer={ranks: 2, backend: deepspeed, deepspeed: {zero: {zero_hpz_partition_size: 4}}}"],
            "trainer.deepspeed.zero.zero_hpz_partition_size is trainer.deepspeed.hpz_partition_size",
            "set that instead",
        ),
        (
            ["trainer={ranks: 6, backend: deepspeed, deepspeed: {hpz_partition_size: 4, zero_stage: 3}}"],
            "6 ranks (trainer.ranks) are no whole number of groups of 4",
            "ranks on each node",
        ),
        (
            ["trainer={lora: {}, backend: paced}", "rollout.engine=paced"],
            "trainer.lora: trainer.backend=paced computes nothing",
            "leave the section out",
        ),
        *(
            (["placement.colocate=turns", "rollout.kv_on_update=recompute", *overrides], reason, remedy)
            for overrides, reason, remedy in [
                (["rollout.kv_on_update=keep"], "keeps no keys and values", "kv_on_update=recompute"),
                (["rollout.torch.cuda_graphs=true"], "CUDA graphs need them to stay", "cuda_graphs=false"),
                (["weights.transport=collective"], "only one of the two has memory", "transport=auto"),
                (["rollout.guests=1"], "guests (rollout.guests=1) compute elsewhere", "rollout.guests=0"),
                (["teacher={path: t, form: exact}"], "beside the policy", "use teacher.form=sampled"),
                (["rollout.engine=http"], "the servers' memory is not its own to give", "engine=vllm"),
                (["rollout.engine=paced"], "has no memory", "placement.colocate=auto"),
                (
                    ["rollout.engine=paced", "trainer.backend=paced"],
                    "trainer.backend=paced cannot",
                    "trainer.backend=deepspeed or trainer.backend=torch",
                ),
                (
                    ["trainer={backend: deepspeed, deepspeed: {offload_optimizer: true}}"],
                    "keep a part there for good",
                    "or use placement.colocate=always",
                ),
                (
                    [
                        "model.dtype=bfloat16",
                        "trainer={backend: deepspeed, deepspeed: {zero_stage: 1}}",
                    ],
                    "zero_stage=1 in bfloat16 cannot give up its memory",
                    "zero_stage=2 or 3",
                ),
            ]
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_reason_and_remedy(
    overrides, reason, remedy, config_file
):
    message = refusal(config_file(), *overrides)
    assert message.startswith(f"{config_file()} with the overrides: ")
    assert reason in message
    assert remedy in message


def test_a_part_of_the_reward_says_which_checkpoints_are_the_best(config_file):
    scored = "evaluation.every_steps=5", "data.held_out_rows=9", "checkpoint.keep_best=1"
    best = "checkpoint.best_of=eval/held_out/reward/right/mean"
    assert load(config_file(), [*scored, best]).checkpoint.best_of
    of_an_episode = "rollout.episode=mine:play", "checkpoint.best_of=eval/held_out/reward/won/mean"
    assert load(config_file(), [*scored, *of_an_episode]).checkpoint.best_of


def test_rewards_may_only_be_watched_where_something_else_teaches(config_file):
    overrides = [f"reward.functions.{i}.weight=0" for i in range(2)]
    assert load(config_file(), [*overrides, "teacher.path=t"]).learns_without_rewards


def test_all_impossible_combinations_are_reported_at_once(config_file):
    message = refusal(config_file(), "trainer.mini_batches=17", "rollout.group_size=1")
    assert len(message.split("\n")) == 2


def test_an_unknown_objective_is_refused_with_those_there_are(config_file):
    message = refusal(config_file(), "objective.policy_loss=decoupled", "objective.advantage=gae2")
    assert "`objective.policy_loss` is 'decoupled'; there are ppo, decoupled_ppo, tis, icepop" in message
    assert "`objective.advantage` is 'gae2'; there are grpo, dr_grpo, rloo" in message
    assert "your own as package.module:function or path/file.py:function" in message


def test_the_settings_of_objectives_reach_them_and_survive_a_dump(config_file, tmp_path):
    config = load(
        config_file(),
        [
            "objective.policy_loss=icepop",
            "objective.ratio_high=.inf",
            "objective.advantage=my/own.py:advantage",
            "objective.settings={beta: 1e-3, deep: {list: [1, null]}}",
        ],
    )
    assert config.objective.settings_of("icepop") == {"ratio_high": math.inf}
    own = {"beta": 1e-3, "deep": {"list": [1, None]}}
    assert config.objective.settings_of("my/own.py:advantage") == own
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_the_choices_of_the_config_are_those_of_the_catalogue():
    def choices(section, key):
        annotation = section.model_fields[key].annotation
        literals = [annotation, *get_args(annotation)]
        return next(get_args(a) for a in literals if get_origin(a) is Literal)

    assert choices(ObjectiveConfig, "aggregation") == AGGREGATIONS
    assert choices(ObjectiveConfig, "proximal") == PROXIMALS
    assert choices(ReferenceConfig, "estimator") == KL_ESTIMATORS


def test_every_setting_of_an_objective_is_a_key_that_defaults_to_its_own():
    for entry in (*POLICY_LOSSES.values(), *GROUP_ADVANTAGES.values()):
        for key in entry.settings:
            assert ObjectiveConfig.model_fields[key].default is None


def sections(section: type[Section] = Config):
    yield section
    for field in section.model_fields.values():
        if inner := section_of(field.annotation):
            yield from sections(inner)


def test_every_key_has_a_docstring():
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not meanings(section)[name] and not is_section(field)
    ]
    assert not undocumented


def is_section(field) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def test_keys_lists_the_whole_tree():
    listed = list(keys())
    assert len(listed) == len(set(listed))
    assert {"run", "run.seed", "rollout.paced.step_base_s", "reward.functions.*.weight"} <= set(listed)
