"""Towers: the image and text encoders of a CLIP model, one file each, and their registry.

To add a tower, write one file with a frozen dataclass that subclasses `ImageTower` or `TextTower` and add its line to
`TOWERS`; from outside the package, `TOWERS["mine"] = MyTower` does the same. Configs, sharding, optimizer, checkpoints
and exported weights then accept it, and `tests/contracts/test_towers.py` tests it.
"""

from clip_jax.models.towers.base import Encoder, ImageTower, Rules, TextTower, Tower
from clip_jax.models.towers.edgenet import EdgeNet
from clip_jax.models.towers.resnet import ResNet
from clip_jax.models.towers.text import TextTransformer
from clip_jax.models.towers.vit import ViT

# Keyed by the tower's `kind`, which configs and weight files store.
TOWERS: dict[str, type[ImageTower] | type[TextTower]] = {
    "vit": ViT,
    "resnet": ResNet,
    "edgenet": EdgeNet,
    "transformer": TextTransformer,
}

__all__ = [
    "TOWERS",
    "EdgeNet",
    "Encoder",
    "ImageTower",
    "ResNet",
    "Rules",
    "TextTower",
    "TextTransformer",
    "Tower",
    "ViT",
]
