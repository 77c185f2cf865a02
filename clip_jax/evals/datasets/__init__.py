"""Evaluation datasets: the registry and its readers."""
