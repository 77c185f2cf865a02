"""CLIP ViT-L/14 at 336 px by the paper's recipe: Radford et al. 2021, section 2.5, tables 18 and 20.

One more epoch from ViT-L/14, whose position embeddings are resized. `init.weights` is where OpenAI's code leaves its
own; for yours, e.g. --config.init.weights=runs/vit_l14/params.msgpack.

python -m clip_jax.main --config=configs/vit_l14_336.py --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import default_config


def get_config() -> ConfigDict:
    """Return one epoch of 400 M pairs, 32,768 at a time, at the rate of fine-tuning."""
    config = default_config("vit_l14_336")
    config.init.weights = "vit_l14"
    config.optim.learning_rate = 2e-5
    config.train.batch_size = 32_768
    config.train.total_examples = 400_000_000  # 12,207 steps
    return config
