"""Training sources, one class per file."""
