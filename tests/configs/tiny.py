"""Smallest complete run: both towers, image decoding, checkpoints, evaluation. Takes seconds on a CPU."""

from clip_jax.config import default_config


def get_config(arg=""):
    del arg
    config = default_config("vit_b32")
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.layers, image.heads = 32, 16, 32, 2, 2
    text.vocab_size, text.context_length, text.eos_id, text.width, text.layers, text.heads = 800, 12, 799, 32, 2, 2
    config.model.embed_dim = 16
    config.data.source = "synthetic"
    config.data.options = {"examples": 100}
    config.data.augment.min_crop_area = 0.5
    config.train.batch_size = 16
    config.train.total_steps = 40
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.log_every_steps = 1
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 5
    config.optim.ema_decay = 0.9
    config.checkpoint.every_steps = 7
    config.eval.every_steps = 20
    config.eval.tasks = {"shapes": {"evaluator": "retrieval", "dataset": "synthetic"}}
    return config
