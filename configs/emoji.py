"""A small CLIP on emoji: real images, human-written names, six minutes on two CPU cores.

The experiments behind these values: docs/emoji.md.

python -m clip_jax.main --config=configs/emoji.py
"""

from ml_collections import ConfigDict

from clip_jax.config import default_config, with_argument

LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")


def get_config(arg: str = "") -> ConfigDict:
    """Return 900 steps of 256 pairs.

    Args:
      arg: `runlocal` for a tiny version on synthetic data: --config=configs/emoji.py:runlocal
    """
    config = default_config("emoji")

    config.data.source = "emoji"
    # One to four texts of an image, drawn anew in every epoch: words in varying combinations generalize better.
    config.data.captions = {"name": 0.5, "alias": 0.1, "keyword": 0.4} | {f"name_{code}": 0.01 for code in LANGUAGES}
    config.data.texts_per_caption = 4
    augment = config.data.augment
    augment.min_crop_area = 1.0  # emoji are square already; zoom crops
    augment.rotate_degrees = 10.0
    augment.zoom = 0.15
    augment.shift = 0.1
    augment.contrast = 0.2
    augment.brightness = 0.1
    augment.saturation = 0.3
    augment.hue_degrees = 15.0
    augment.grayscale_probability = 0.05

    config.train.batch_size = 256
    config.train.total_steps = 900
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.text_capacity = 1.0  # joined texts fill their positions
    config.train.log_every_steps = 20
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 60
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.max_grad_norm = 1.0
    config.optim.ema_decay = 0.995
    config.checkpoint.every_steps = 150

    config.eval.every_steps = 300
    config.eval.baselines_dataset = "emoji_seen_concepts"
    config.eval.thresholds = {
        "retrieval/emoji_unseen_concepts/image_to_text/recall_at_5": 0.28,
        "retrieval/emoji_unseen_vendor/image_to_text/recall_at_1": 0.20,
    }
    splits = dict.fromkeys(("unseen_concepts", "unseen_vendor", "unseen_both"), "retrieval")
    splits |= dict.fromkeys(("categories", "subcategories"), "zeroshot")
    splits |= {f"unseen_concepts_{code}": "retrieval" for code in LANGUAGES}
    config.eval.tasks = {
        f"emoji_{split}": {"evaluator": evaluator, "dataset": f"emoji_{split}"} for split, evaluator in splits.items()
    }
    return with_argument(config, arg)
