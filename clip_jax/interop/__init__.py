"""Weights in and out: each format a module with `read` and `write`."""
