"""CLIP ViT-B/32 by the paper's recipe: Radford et al. 2021, section 2.5, tables 18 and 20.

python -m clip_jax.main --config=configs/vit_b32.py --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import default_config


def get_config() -> ConfigDict:
    """Return 32 epochs of 400 M pairs, 32,768 at a time; the optimizer's values are the defaults."""
    config = default_config("vit_b32")
    config.train.batch_size = 32_768
    config.train.total_examples = 12_800_000_000  # 390,625 steps; with less data, give train.total_epochs=32
    return config
