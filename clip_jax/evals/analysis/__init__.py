"""Analyses of evaluation results: baselines, bias, robustness, overlap with the training data."""
