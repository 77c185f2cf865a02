"""Base classes of tower configurations: the interface between a tower and the rest of the package."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Int32

from clip_jax.models.attention import AttentionShape
from clip_jax.models.layers import Compute, Rules
from clip_jax.typing import ArrayLike

Range = tuple[int | float, int | float]  # inclusive bounds of a number
COUNT: Range = (1, 2**62)
# By name of the field; all others are positive counts.
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
    """Configuration of an encoder. Subclasses are frozen dataclasses whose fields are hyperparameters.

    Paths of parameters are relative to the tower and separated by "/", e.g. "transformer/blocks/mlp/in/kernel".

    Fields every tower has:
      kind: its key in `TOWERS`, as a `Literal` with a default.
      width: features per position.

    Class attributes:
      sharding_rules: (regular expression, mesh axes of the last dimensions) pairs; exactly one expression must match
        the whole path of each parameter. Leading dimensions and `None` are replicated. Axes are "fsdp" and "tensor".
      stacked: regular expression of the paths whose parameters have a leading axis of layers; by default none.
    """

    kind: str
    width: int
    sharding_rules: ClassVar[Rules] = ()
    stacked: ClassVar[str] = r"(?!)"

    def module(self, embed_dim: int, compute: Compute, patch_dropout: float = 0.0) -> nn.Module:
        """Return the linen module.

        Args:
          embed_dim: size of the output.
          compute: dtype, rematerialization, sharding; it changes no number beyond rounding.
          patch_dropout: fraction of patches that training drops; nonzero only if `supports_patch_dropout`.
        """
        raise NotImplementedError

    def layer(self, path: str) -> int | range:
        """Return the position of a parameter between input (0) and output (`output_layer`).

        Layer-wise learning-rate decay uses it. Parameters stacked over layers have a range, one entry per layer.
        """
        raise NotImplementedError

    @property
    def output_layer(self) -> int:
        """The largest value of `layer`: that of the parameters after the last block."""
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

    @property
    def fixed_embed_dim(self) -> int | None:
        """The only possible `embed_dim` of a tower without projection; None if the tower projects to any."""
        return None

    @property
    def attention_shape(self) -> AttentionShape | None:
        """Shape of the self-attention in the tower's blocks; None if it has none."""
        return None

    @property
    def uncounted_flops(self) -> float:
        """FLOPs per example that published counts include and this implementation saves.

        Where one position is pooled, the last block computes only that one after attention.
        """
        return 0.0

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


class ImageTower(Tower):
    """Configuration of an image encoder.

    The module is called as `module(image, train=False, key_B=None, project=True)` with normalized pixels
    [B, H, W, 3] and returns [B, E]; with `project=False`, the input of the final projection, [B, D]. `key_B` holds one
    random key per image, for training. Batch statistics go to the collection "batch_stats".

    Additional fields:
      image_size: side in pixels.
    """

    image_size: int
    supports_patch_dropout: ClassVar[bool] = False

    @property
    def stride(self) -> int:
        """Pixels of the image per position of the last feature map or patch grid, along a side."""
        raise NotImplementedError

    @property
    def ignores_partial_patch(self) -> bool:
        """Whether `image_size` may be no multiple of `stride`; the remaining pixels are ignored."""
        return False

    @property
    def positions_path(self) -> tuple[str, ...] | None:
        """Path of the position embedding [L, D] of the position grid, in row-major order; None if there is none."""
        return None

    @property
    def num_prefix_tokens(self) -> int:
        """Number of rows of the position embedding before the grid's, such as a class token's."""
        return 0


class TextTower(Tower):
    """Configuration of a text encoder.

    The module is called as `module(text)` with token ids int32[B, L], or a `packing.Stream` if `supports_packing`, and
    returns [B, E].

    Additional fields:
      vocab_size: number of token ids.
      context_length: tokens per text, start and end tokens included.
      eos_id: id of the end token; the tokenizer must have the same.
    """

    vocab_size: int
    context_length: int
    eos_id: int

    @property
    def supports_packing(self) -> bool:
        """Whether texts can be packed (`packing.py`): tokens after the end token must not affect the output."""
        return False

    def end_positions(self, text_BL: Int32[ArrayLike, "B L"]) -> Int32[Array, "B"]:
        """Return the position of the first end token in each text, 0 if there is none; packing needs it."""
        raise NotImplementedError


def check_multiple(key: str, size: int, unit_key: str, unit: int, *, exact: bool = True) -> None:
    """Raise ValueError unless `size` is at least `unit` and, if `exact`, a multiple of it."""
    if size < unit or (exact and size % unit):
        raise ValueError(f"{key}={size} is not a multiple of {unit_key}={unit}; use {max(1, size // unit) * unit}")


def check_heads(key: str, width: int, heads: int, attention_width: int) -> None:
    """Raise ValueError unless the number of heads divides the width of the attention."""
    if attention_width % heads:
        raise ValueError(f"{key}.width={width} is not a multiple of {key}.heads={heads}")
