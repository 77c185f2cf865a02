"""Configuration: schema, strict conversion from ConfigDict, presets, checks."""

from clip_jax.config.build import (
    build,
    check_known_options,
    check_name,
    default_config,
    did_you_mean,
    differences,
    flatten,
    from_config_dict,
    from_json,
    mapping_keys,
    schema_keys,
    to_config_dict,
    to_json,
    unknown_key,
)
from clip_jax.config.models import (
    MODELS,
    PREPROCESS,
    SIGLIP_PREPROCESS,
    name_of,
    preprocess_names,
    preprocess_of,
    siglip_image,
    tokenizer_of,
)
from clip_jax.config.recipes import paper, runlocal, with_argument
from clip_jax.config.resolve import Resolved, check_local_paths, data_notes, resolve
from clip_jax.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DatasetConfig,
    EvalConfig,
    EvalTask,
    FilterConfig,
    InitConfig,
    MeshConfig,
    OptimConfig,
    TeacherConfig,
    TokenizerConfig,
    TrainConfig,
    WeightsConfig,
)
from clip_jax.models.architecture import Architecture, Preprocess, check, with_activation
from clip_jax.models.layers import Activation
from clip_jax.models.towers import TOWERS, EdgeNet, ImageTower, ResNet, TextTower, TextTransformer, ViT
