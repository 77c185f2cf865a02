"""CLIP ViT-L/14 at 336 px by the paper's recipe: Radford et al. 2021, section 2.5, tables 18 and 20.

One more epoch from ViT-L/14, whose position embeddings are resized. `init.weights` names OpenAI's file, at the path
where its code stores it; for another run, e.g. --config.init.weights=runs/vit_l14/params.msgpack.

python -m clip_jax.main --config=configs/vit_l14_336.py --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import paper, with_argument


def get_config(arg: str = "") -> ConfigDict:
    """Return one epoch of 400 M pairs, 32,768 at a time, at the learning rate of fine-tuning.

    Args:
      arg: `runlocal` for a tiny version on synthetic data: --config=configs/vit_l14_336.py:runlocal
    """
    config = paper("vit_l14_336", learning_rate=2e-5, total_examples=400_000_000)  # 12,207 steps
    config.init.weights = "vit_l14"
    return with_argument(config, arg)
