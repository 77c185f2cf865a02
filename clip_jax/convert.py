"""Convert weights between clip_jax, open_clip, transformers and OpenAI.

    clip-jax convert ViT-L-14.pt vit_l14.msgpack
    clip-jax convert runs/mine/params.msgpack mine --to=directory
    clip-jax convert runs/mine/params.msgpack half.msgpack --dtype=bfloat16

The first argument is any path or name that `clip_jax.load` accepts. Prints a summary of the model and of the files
written. Exit codes: 0; 2 for wrong flags or input, with a one-line error.
"""

from __future__ import annotations

from absl import flags

from clip_jax import command

_TO = flags.DEFINE_string(
    "to", "msgpack", "Format: msgpack, npz, directory (for other libraries) or another writable one."
)
_weights_options = command.define_weights_flags()
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the parameters; default: as stored, else float32."
)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "Image size in px to resize to.", lower_bound=0)
_CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 0, "Context length in tokens to resize to.", lower_bound=0)


def main(paths: list[str]) -> int:
    """Convert and print the summary. Returns the exit code."""
    import clip_jax.training  # noqa: F401 (registers the format of runs)
    from clip_jax.interop.convert import convert

    if len(paths) != 2:
        raise ValueError(f"expected SRC and DST, e.g. ViT-B-32.pt params.msgpack, got {len(paths)} arguments")
    sizes = {"image_size": _IMAGE_SIZE.value, "context_length": _CONTEXT_LENGTH.value}
    print(convert(*paths, to=_TO.value, dtype=_DTYPE.value or "", **_weights_options(), **sizes))
    return command.FINISHED


if __name__ == "__main__":
    command.run(main, positional=True)
