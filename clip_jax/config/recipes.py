"""Training recipes: the paper's, and the tiny version of any config that `--config=FILE:runlocal` selects."""

from __future__ import annotations

import dataclasses

import ml_collections

from clip_jax.config import schema
from clip_jax.config.build import default_config, from_config_dict, to_config_dict
from clip_jax.config.models import MODELS
from clip_jax.models.towers import ResNet


def paper(
    model: str, arg: str = "", *, learning_rate: float = 5e-4, total_examples: int = 12_800_000_000
) -> ml_collections.ConfigDict:
    """Return the recipe of Radford et al. 2021, section 2.5 and table 18, for a model of `MODELS`.

    The defaults are 32 epochs of 400 M pairs in batches of 32,768: 390,625 steps. ResNets have other Adam values.

    Args:
      arg: see `with_argument`.
      learning_rate: the peak, which the paper lowers for its largest models (tables 19 and 20).

    >>> config = paper("vit_l14", learning_rate=4e-4)
    >>> config.model.image.patch_size, config.train.total_examples
    (14, 12800000000)
    """
    config = default_config(model)
    config.optim.learning_rate = learning_rate
    if isinstance(MODELS[model].image, ResNet):
        config.optim.b2, config.optim.eps = 0.999, 1e-8
    config.train.total_examples = total_examples
    return with_argument(config, arg)


def with_argument(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """Return the config, or its tiny version for `arg`='runlocal', the text behind the colon of `--config=FILE:ARG`."""
    if arg not in ("", "runlocal"):
        raise ValueError(
            f"--config=FILE:{arg}: expected no argument or 'runlocal', as in --config=configs/vit_b32.py:runlocal"
        )
    return runlocal(config) if arg else config


def runlocal(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return a tiny version of a config: the same structure, loss and optimizer, synthetic data, a minute on a CPU.

    >>> from clip_jax.config import default_config
    >>> tiny = runlocal(default_config("vit_l14"))
    >>> tiny.model.image.layers, tiny.data.source
    (2, 'synthetic')
    """
    full = from_config_dict(config)
    image = full.model.image.tiny()
    text = dataclasses.replace(full.model.text.tiny(), vocab_size=800, eos_id=799)
    duration = {"batch_size": 64, "total_steps": 40, "total_epochs": 0.0, "total_examples": 0}
    embed_dim = image.fixed_embed_dim or text.fixed_embed_dim or 32
    tiny = dataclasses.replace(
        full,
        model=dataclasses.replace(full.model, image=image, text=text, embed_dim=embed_dim),
        tokenizer=schema.TokenizerConfig(),
        data=schema.DataConfig(
            source="synthetic",
            augment=schema.AugmentConfig(min_crop_area=0.5),
            cache_dir=full.data.cache_dir,
        ),
        init=schema.InitConfig(),
        teacher=schema.TeacherConfig(),
        optim=dataclasses.replace(full.optim, warmup_steps=5),
        train=dataclasses.replace(full.train, dtype="float32", micro_batches=1, log_every_steps=5, **duration),
        mesh=schema.MeshConfig(),
        checkpoint=schema.CheckpointConfig(every_steps=20),
        eval=schema.EvalConfig(every_steps=20, tasks={"shapes": schema.EvalTask("retrieval", "synthetic")}),
    )
    return to_config_dict(tiny)
