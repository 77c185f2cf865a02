"""Ahead-of-time planning of a training step: `python -m clip_jax.plan`."""
