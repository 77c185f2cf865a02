"""A small CLIP on emoji: real pictures, human-written names, eight minutes on two CPU cores."""

from clip_jax.config import default_config

LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")


def get_config(arg=""):
    """Return the config of the demo; README says what was tried."""
    del arg
    config = default_config("emoji")
    config.tokenizer.name = "clip_bpe"

    config.data.source = "emoji"
    config.data.captions = {"name": 4.0, "alias": 1.0, "keyword": 2.0} | {f"name_{language}": 0.1 for language in LANGUAGES}
    augment = config.data.augment
    augment.min_crop_area = 0.8
    augment.rotate_degrees = 8.0
    augment.zoom = 0.15
    augment.shift = 0.05
    augment.contrast = 0.2
    augment.saturation = 0.3
    augment.hue_degrees = 15.0
    augment.grayscale_probability = 0.05

    config.train.batch_size = 256
    config.train.total_steps = 500
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.log_every_steps = 10
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.checkpoint.every_steps = 100

    config.eval.every_steps = 250
    config.eval.floors_split = "seen_concepts"
    retrieval = {name: ("retrieval", name) for name in ("unseen_concepts", "unseen_vendor", "unseen_both")}
    zeroshot = {name: ("zeroshot", name) for name in ("categories", "subcategories")}
    languages = {f"unseen_concepts_{language}": ("retrieval", f"unseen_concepts_{language}") for language in LANGUAGES}
    config.eval.tasks = {
        f"emoji_{name}": {"evaluator": evaluator, "source": "emoji", "split": split}
        for name, (evaluator, split) in (retrieval | zeroshot | languages).items()
    }
    return config
