"""CLIP ResNet-101 by the paper's recipe: Radford et al. 2021, section 2.5, tables 18 and 19.

python -m clip_jax.main --config=configs/rn101.py --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import paper


def get_config(arg: str = "") -> ConfigDict:
    """Return 32 epochs of 400 M pairs, 32,768 at a time.

    Args:
      arg: `runlocal` for a tiny version on synthetic data: --config=configs/rn101.py:runlocal
    """
    return paper("rn101", arg)
