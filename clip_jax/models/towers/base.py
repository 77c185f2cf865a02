"""Base classes of tower configurations: the interface between a tower and the rest of the package."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, Int32, Key

from clip_jax.models.attention import AttentionShape
from clip_jax.models.layers import Compute, Rules
from clip_jax.models.packing import Stream
from clip_jax.typing import ArrayLike

Range = tuple[int | float, int | float]  # inclusive bounds of a number
COUNT: Range = (1, 2**62)
# By name of the field; all others are positive counts. A tower with other numbers extends `ranges`.
RANGES: dict[str, Range] = {
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "context_length": (3, 2**20),
    "eos_id": (0, 2**31 - 1),
    "mlp_ratio": (0.01, 100.0),
    "norm_epsilon": (1e-12, 1e-2),
    "layer_scale": (0.0, 1.0),
}


class Tower:
    """Configuration and computation of an encoder. Subclasses are frozen dataclasses whose fields are hyperparameters.

    Paths of parameters are relative to the tower and separated by "/", e.g. "transformer/blocks/mlp/in/kernel".
    Class attributes may also be properties.
    """

    kind: str  # field: its key in `TOWERS`, as a `Literal` with a default
    width: int  # field: features per position

    # (regular expression, mesh axes of the last dimensions) pairs; exactly one expression must match the whole path of
    # each parameter. Leading dimensions and `None` are replicated. Axes are "fsdp" and "tensor".
    sharding_rules: ClassVar[Rules] = ()
    stacked: ClassVar[str] = r"(?!)"  # regular expression of the paths of parameters with a leading axis of layers
    output_layer: ClassVar[int]  # the largest value of `layer`: that of the parameters after the last block
    fixed_embed_dim: ClassVar[int | None] = None  # the only possible `embed_dim` of a tower without projection
    attention_shape: ClassVar[AttentionShape | None] = None  # of the self-attention in the tower's blocks
    # FLOPs per example that published counts include and this implementation saves: where one position is pooled, the
    # last block computes only that one after attention.
    uncounted_flops: ClassVar[float] = 0.0

    def layer(self, path: str) -> int | range:
        """Return the position of a parameter between input (0) and output (`output_layer`).

        Layer-wise learning-rate decay uses it. Parameters stacked over layers have a range, one entry per layer.
        """
        raise NotImplementedError

    def tiny(self) -> Tower:
        """Return a tower with the same structure and minimal sizes, for tests. Text towers keep their vocabulary."""
        raise NotImplementedError

    @classmethod
    def ranges(cls) -> dict[str, Range]:
        """Return the inclusive bounds of all numeric fields, those of each element for tuples."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        numeric = [n for n, x in defaults.items() if isinstance(x, (int, float, tuple)) and not isinstance(x, bool)]
        return {name: RANGES.get(name, COUNT) for name in numeric}

    @property
    def description(self) -> str:
        """The tower's size in a few words, for reports."""
        return self.kind

    def with_activation(self, activation: str) -> Tower:
        """Return the tower with another activation function; towers without the field are unchanged."""
        return dataclasses.replace(self, activation=activation) if hasattr(self, "activation") else self

    def check(self, key: str, embed_dim: int) -> None:
        """Check sizes against each other.

        Args:
          key: the tower's config key, e.g. "model.image".
          embed_dim: size of the output.

        Raises:
          ValueError: with the config key and a value that works.
        """
        if self.fixed_embed_dim not in (None, embed_dim):
            raise ValueError(
                f"{key} has no projection, so model.embed_dim={embed_dim} has to be its width {self.fixed_embed_dim}"
            )


class Encoder(nn.Module):
    """Linen module of a tower: the scope in which `encode` creates its parameters and submodules.

    embed_dim: size of the output.
    compute: dtype, rematerialization, sharding; it changes no number beyond rounding.
    patch_dropout: fraction of patches that training drops; nonzero only if the tower `supports_patch_dropout`.
    """

    tower: Tower
    embed_dim: int
    compute: Compute
    patch_dropout: float = 0.0

    @nn.compact
    def __call__(self, *inputs: Any) -> Array:
        return self.tower.encode(self, *inputs)


class ImageTower(Tower):
    """Configuration and computation of an image encoder."""

    image_size: int  # field: side in pixels

    supports_patch_dropout: ClassVar[bool] = False
    stride: ClassVar[int]  # pixels of the image per position of the last feature map or patch grid, along a side
    # Whether `image_size` may be no multiple of `stride`; the remaining pixels are ignored.
    ignores_partial_patch: ClassVar[bool] = False
    # Path of the position embedding [L, D] of the position grid, in row-major order; None if there is none.
    positions_path: ClassVar[tuple[str, ...] | None] = None
    num_prefix_tokens: ClassVar[int] = 0  # rows of the position embedding before the grid's, such as a class token's

    def encode(
        self, module: Encoder, image: Float[Array, "B H W 3"], train: bool, key_B: Key[Array, "B"] | None, project: bool
    ) -> Float[Array, "B E"]:
        """Encode images.

        Args:
          image: normalized pixels.
          train: whether to drop patches and to update batch statistics, in the collection "batch_stats".
          key_B: one random key per image, for training.
          project: False: return the input of the final projection, [B, D].
        """
        raise NotImplementedError


class TextTower(Tower):
    """Configuration and computation of a text encoder."""

    vocab_size: int  # field: number of token ids
    context_length: int  # field: tokens per text, start and end tokens included
    eos_id: int  # field: id of the end token; the tokenizer must have the same

    # Whether texts can be packed (`packing.py`): tokens after the end token must not affect the output.
    supports_packing: ClassVar[bool] = False

    def encode(self, module: Encoder, text: Int32[ArrayLike, "B L"] | Stream) -> Float[Array, "B E"]:
        """Encode token ids; packed ones (`packing.Stream`) if `supports_packing`."""
        raise NotImplementedError

    def end_positions(self, text_BL: Int32[ArrayLike, "B L"]) -> Int32[Array, "B"]:
        """Return the position of the first end token in each text, 0 if there is none; packing needs it."""
        raise NotImplementedError


def check_multiple(key: str, size: int, unit_key: str, unit: int, *, exact: bool = True) -> None:
    """Raise ValueError unless `size` is at least `unit` and, if `exact`, a multiple of it."""
    if size < unit or (exact and size % unit):
        raise ValueError(f"{key}={size} is not a multiple of {unit_key}={unit}; use {max(1, size // unit) * unit}")
