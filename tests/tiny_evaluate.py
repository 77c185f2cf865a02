"""Runs `python -m clip_jax.evaluate` with a registry whose datasets may have any size, without published prompts."""

import dataclasses
import runpy

from clip_jax.evals.datasets.registry import DATASETS

if __name__ == "__main__":
    for name, row in DATASETS.items():
        DATASETS[name] = dataclasses.replace(row, size=0, class_names="", templates="")
    runpy.run_module("clip_jax.evaluate", run_name="__main__", alter_sys=True)
