"""SigLIP B/16 at 224 px: Zhai et al. 2023 (arXiv:2303.15343), section 4.

Batch size, learning rate, weight decay and β2 are the paper's; warm-up length and gradient clipping are this project's.
The vocabulary is that of a SentencePiece model with 32,000 pieces: give its file.

python -m clip_jax.main --config=configs/siglip_b16.py --config.tokenizer.path=/data/c4_en.model \\
  --config.data.files='/data/cc3m/{00000..00331}.tfrecord'
"""

from ml_collections import ConfigDict

from clip_jax.config import default_config, with_argument


def get_config(arg: str = "") -> ConfigDict:
    """Return 40 billion pairs, 32,768 at a time, with the sigmoid loss.

    Args:
      arg: `runlocal` for a tiny version on synthetic data: --config=configs/siglip_b16.py:runlocal
    """
    config = default_config("siglip_b16")
    config.loss.name = "sigmoid"
    config.loss.logit_scale_init = 10.0
    config.loss.logit_bias_init = -10.0
    config.loss.logit_scale_max = 1000.0
    config.optim.learning_rate = 1e-3
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.weight_decay = 1e-4
    config.optim.max_grad_norm = 1.0
    config.optim.warmup_steps = 20_000
    config.train.total_examples = 40_000_000_000  # 1,220,703 steps
    return with_argument(config, arg)
