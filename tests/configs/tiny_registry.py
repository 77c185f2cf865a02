"""Smallest run with evaluation datasets of the registry: one from a pip package, one that is not available."""

import runpy
from pathlib import Path


def get_config(arg=""):
    config = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"](arg)
    config.train.total_steps = 20
    config.eval.every_steps = 10
    config.eval.tasks = {
        "digits": {"evaluator": "zeroshot", "dataset": "digits"},
        "little_images": {"evaluator": "zeroshot", "dataset": "cifar10"},
    }
    return config
