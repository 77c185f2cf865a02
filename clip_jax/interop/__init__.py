"""Weights in and out: `reading` takes any format; msgpack and npz are ours, `directory` is what others load."""
