"""Weights from one format to another: `python -m clip_jax.convert SRC DST --to=msgpack|directory|npz`.

SRC is anything that `clip_jax.load` takes. What was found and what was written is printed. Exit codes: 0; 2, wrong
flags or input, with one sentence.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence

from absl import app, flags

REFUSED = 2

_TO = flags.DEFINE_enum("to", "msgpack", ["msgpack", "directory", "npz"], "What to write; directory: for others.")
_MODEL = flags.DEFINE_string("model", "", "A model's name, e.g. vit_b32, where the file can't tell.")
_ACTIVATION = flags.DEFINE_string("activation", "", "quick_gelu, gelu or gelu_tanh, where the file can't tell.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "px, to resize the position embeddings to.", lower_bound=0)
_CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 0, "Tokens, likewise.", lower_bound=0)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "A SentencePiece .model or a tokenizer.json, for weights without theirs."
)


def main(argv: Sequence[str]) -> None:
    """Convert, and say what was found and written."""
    logging.getLogger("jax").setLevel(logging.WARNING)  # absl shows its search for a TPU
    try:
        if len(argv) != 3:
            raise ValueError("expected SRC and DST, e.g. ViT-B-32.pt params.msgpack")
        print(_convert(argv[1], argv[2], _TO.value))
    except (ValueError, FileNotFoundError) as error:
        print(f"clip_jax.convert: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _convert(source: str, target: str, to: str) -> str:
    from clip_jax.interop import directory, msgpack, npz, reading

    weights = reading.read(
        source,
        model=_MODEL.value,
        activation=_ACTIVATION.value,
        image_size=_IMAGE_SIZE.value,
        context_length=_CONTEXT_LENGTH.value,
        tokenizer=_TOKENIZER.value,
    )
    config, params = dataclasses.replace(weights.config, source=source), weights.params
    lines = [f"found    {source}: {weights.format}", *_described(config, params)]
    if to == "directory":
        parts = directory.write(target, params, config)
        return "\n".join([*lines, f"wrote    {target}", *(f"  {name + ':':<15}{how}" for name, how in parts.items())])
    (msgpack if to == "msgpack" else npz).write(target, params, config)
    return "\n".join([*lines, f"wrote    {target}: clip_jax.load({target!r})"])


def _described(config, params) -> list[str]:
    from clip_jax.config import name_of
    from clip_jax.models import count_parameters

    image, text = config.model.image, config.model.text
    activations = {text.activation, getattr(image, "activation", text.activation)}
    size = {"vit": lambda: f"{image.layers} layers of {image.width}, patches of {image.patch_size} px",
            "resnet": lambda: f"{'-'.join(map(str, image.layers))} bottlenecks from {image.width}",
            "edges": lambda: "edge net"}[image.kind]()  # fmt: skip
    spec = config.preprocess
    rows = {
        "model": f"{name_of(config.model)}, {count_parameters(params):,} parameters",
        "image": f"{image.image_size} px, {size}",
        "text": f"{text.length} tokens of {text.vocab_size:,}, {text.layers} layers of {text.width}",
        "embedding": f"{config.model.embed_dim}",
        "activation": " and ".join(sorted(activations)),
        "preprocessing": f"{spec.resize}, {spec.interpolation}, mean {spec.mean}, std {spec.std}"
        f", like {spec.implementation}",
        "tokenizer": config.tokenizer.name + ("" if _has_tokenizer(config) else " (none came with the weights)"),
    }
    return [f"  {name + ':':<15}{value}" for name, value in rows.items()]


def _has_tokenizer(config) -> bool:
    return config.tokenizer.name == "clip_bpe" or bool(config.tokenizer_file or config.tokenizer.path)


if __name__ == "__main__":
    app.run(main)
