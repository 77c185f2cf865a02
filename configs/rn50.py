"""CLIP ResNet-50 by the paper's recipe: Radford et al. 2021, section 2.5, tables 18 and 19.

python -m clip_jax.main --config=configs/rn50.py --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import default_config


def get_config() -> ConfigDict:
    """Return 32 epochs of 400 M pairs, 32,768 at a time, with Adam's values for ResNets."""
    config = default_config("rn50")
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.train.batch_size = 32_768
    config.train.total_examples = 12_800_000_000  # 390,625 steps; with less data, give train.total_epochs=32
    return config
