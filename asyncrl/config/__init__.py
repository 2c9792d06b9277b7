"""The run's settings: one typed tree, read from YAML and overrides, refused with a remedy when wrong."""

from asyncrl.config.load import InvalidSettings, dump, from_tree, keys, load
from asyncrl.config.objective import (
    CriticConfig,
    ObjectiveConfig,
    ReferenceConfig,
    ReplayConfig,
    TeacherConfig,
)
from asyncrl.config.reward import (
    LikelihoodConfig,
    RewardConfig,
    RewardJudgeConfig,
    RewardModelConfig,
    RewardPartConfig,
)
from asyncrl.config.rollout import RolloutConfig
from asyncrl.config.run import STEP_STALLS, CheckpointConfig, NetworkConfig, RunConfig
from asyncrl.config.schema import Config, DataConfig, ModelConfig, SftConfig
from asyncrl.config.sweep import SweepConfig
from asyncrl.config.trainer import TrainerConfig
from asyncrl.section import Section, section_of

__all__ = [
    "STEP_STALLS",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "InvalidSettings",
    "LikelihoodConfig",
    "ModelConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "ReferenceConfig",
    "ReplayConfig",
    "RewardConfig",
    "RewardJudgeConfig",
    "RewardModelConfig",
    "RewardPartConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "SftConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrainerConfig",
    "dump",
    "from_tree",
    "keys",
    "load",
    "section_of",
]
