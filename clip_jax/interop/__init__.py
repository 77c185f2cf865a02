"""Pretrained weights, read and written. `reading.read` reads every format in `formats.FORMATS`."""
