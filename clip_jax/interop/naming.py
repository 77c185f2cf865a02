"""Detection of the library that named a file's tensors, and of the prefix that trainers and wrappers put before.

A checkpoint contains the model at any depth, alongside an optimizer, averages or random states. The model is found by
its markers: tensors that one naming alone has. The text before a marker is the prefix of the model's tensors.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping

import numpy as np

from clip_jax.interop import name_tables
from clip_jax.interop.name_tables import Table

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Naming:
    """A library's naming of tensors and the defaults of its models without a config."""

    title: str
    table: Table
    markers: tuple[str, ...]  # a file with one of these tensors has this naming
    text_markers: tuple[str, ...] = ()  # likewise, of a text tower alone
    text_prefix: str = ""  # removed from the names
    activation: str = ""  # of all models with this naming; empty: unknown
    config_file: str = "open_clip_config.json"  # of this naming, if a directory has several
    siglip: bool = False  # text tower and preprocessing of SigLIP, even without logit bias (LiT)


_VISION, _TEXT = "vision_model.embeddings.patch_embedding", "text_model.embeddings.token_embedding"
_BIG_VISION = ("img/embedding/kernel", "txt/Embed_0/embedding")
NAMINGS = (
    # open_clip's custom_text adds `text.`
    Naming("OpenAI", name_tables.OPENAI, ("visual.conv1.weight",), ("token_embedding.weight",), text_prefix="text."),
    Naming("open_clip SigLIP", name_tables.OPEN_CLIP_SIGLIP, ("visual.trunk.attn_pool.latent",), siglip=True),
    Naming(
        *("Hugging Face SigLIP", name_tables.HUGGINGFACE_SIGLIP, ("vision_model.head.probe",)),
        text_markers=("text_model.head.weight",),
        config_file="config.json",
        siglip=True,
    ),
    Naming(
        *("Hugging Face", name_tables.HUGGINGFACE, (f"{_VISION}.weight",), (f"{_TEXT}.weight",)),
        config_file="config.json",
    ),
    Naming(
        *("Hugging Face Flax", name_tables.HUGGINGFACE_FLAX, (f"{_VISION}.kernel",), (f"{_TEXT}.embedding",)),
        config_file="config.json",
    ),
    # gelu_tanh is the default of flax.linen.gelu.
    Naming("big_vision", name_tables.BIG_VISION, _BIG_VISION, activation="gelu_tanh", siglip=True),
)
# Markers of transformers' classes of one tower, whose names lack that of the tower.
_WITHOUT_TOWER = {
    "embeddings.patch_embedding.weight": "vision_model.",
    "embeddings.token_embedding.weight": "text_model.",
}

# Modules that torch inserts at any depth: torch.compile, FSDP, activation checkpointing, Lightning Fabric.
_INSERTED = re.compile(r"(?<![^./])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_OPTIMIZERS = {"opt", "optimizer"}
_COPIES = {"ema", "swa", "averaged", "shadow", "momentum"}  # averages of the weights

_UNSUPPORTED = {
    r"(^|[._/])lora_|\.base_layer\.": "adapters that are not merged (LoRA); merge them, with peft by"
    " model.merge_and_unload(), and save the model again",
    r"^positional_embedding_res$": "Long-CLIP's second position embedding, which clip_jax does not support",
    r"(weight_scale|scale_weight|qweight|qzeros|\.SCB|\.absmax)$": "quantized weights; save the model in float16",
}


def detect_naming(
    tensors: Mapping[str, np.ndarray], file: str, prefix: str = ""
) -> tuple[Naming, dict[str, np.ndarray], str]:
    """Return the naming of the model in a file, its tensors without their prefix, and the prefix.

    If a file contains weights and their average (EMA), the weights are returned and a warning names both.

    Args:
      tensors: all tensors of the file; names of nested containers joined by dots or slashes.
      file: for messages.
      prefix: of the model to return, for files with several; empty: determined.

    Raises:
      ValueError: for tensors of an unsupported model, for several models, or a prefix that no tensor has.
    """
    names, outer = _without_inserted(tensors, file), ""
    if prefix:
        outer = _INSERTED.sub("", prefix.rstrip("./") + ".")
        names = {n[len(outer) :]: t for n, t in names.items() if n.startswith((outer, outer[:-1] + "/"))}
        if not names:
            known = _listed(_prefixes(_without_inserted(tensors, file))) or "none"
            raise ValueError(f"{file}: prefix={prefix!r}: expected a prefix of tensors, got none; the file has {known}")
    prefixes = _prefixes(names)
    if not prefixes:
        _check_supported(names, file)
        raise ValueError(_unknown_names(names, file))
    selected = _selected(prefixes, file)
    others = tuple(p for p in prefixes if len(p) > len(selected) and p.startswith(selected))
    found = {n[len(selected) :]: t for n, t in names.items() if n.startswith(selected) and not n.startswith(others)}
    _log_ignored(names, selected, file)
    tower = next((tower for marker, tower in _WITHOUT_TOWER.items() if marker in found), "")
    found = {tower + name: tensor for name, tensor in found.items()}
    naming = next(n for n in NAMINGS if not found.keys().isdisjoint((*n.markers, *n.text_markers)))
    found = {name.removeprefix(naming.text_prefix): tensor for name, tensor in found.items()}
    _check_supported(found, file)
    return naming, found, outer + selected


def _without_inserted(tensors: Mapping[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
    names = {_INSERTED.sub("", name): tensor for name, tensor in tensors.items()}
    if len(names) < len(tensors):
        twice, _ = collections.Counter(_INSERTED.sub("", name) for name in tensors).most_common(1)[0]
        raise ValueError(
            f"{file}: tensor {twice}: expected it once, got it also below a wrapper; save one of the models"
        )
    return names


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of all models among the names, without those of an optimizer's moments."""
    image = {marker for naming in NAMINGS for marker in naming.markers}
    text = {marker for naming in NAMINGS for marker in naming.text_markers}
    longest_first = sorted(image | text | {*_WITHOUT_TOWER}, key=len, reverse=True)
    ends = tuple(longest_first)
    found = {"image": {}, "text": {}}
    for name in names:
        if not name.endswith(ends):
            continue
        marker = next(marker for marker in longest_first if name.endswith(marker))
        prefix = name.removesuffix(marker)
        if not prefix or prefix[-1] in "./":
            is_image = marker in image or _WITHOUT_TOWER.get(marker) == "vision_model."
            found["image" if is_image else "text"][prefix] = None
    return [prefix for prefix in found["image"] or found["text"] if _OPTIMIZERS.isdisjoint(_words(prefix))]


def _words(prefix: str) -> list[str]:
    return re.split(r"[._/]", prefix.lower())


def _selected(prefixes: list[str], file: str) -> str:
    """Return the only prefix, or the only one that is not of an average. Raises ValueError for several."""
    weights = [prefix for prefix in prefixes if _COPIES.isdisjoint(_words(prefix))]
    if len(prefixes) == 1:
        return prefixes[0]
    if len(weights) != 1:
        raise ValueError(
            f"{file}: expected one model, got {len(prefixes)}: {_listed(prefixes)}; give one of them, e.g."
            f" prefix={prefixes[-1]!r}"
        )
    averages = [prefix for prefix in prefixes if prefix != weights[0]]
    log.warning(
        "%s: reading the weights (prefix %r), not their average; give prefix=%r for it", file, weights[0], averages[0]
    )
    return weights[0]


def _listed(prefixes: list[str]) -> str:
    return ", ".join(map(repr, prefixes))


def _log_ignored(names: Iterable[str], prefix: str, file: str) -> None:
    """Log the tensors outside of the model: an optimizer, random states, another module."""
    groups = collections.Counter(re.split(r"[./]", name)[0] for name in names if not name.startswith(prefix))
    if groups:
        listed = ", ".join(f"{group} ({count})" for group, count in groups.most_common(4))
        log.info("%s: reading the tensors below %r; ignoring %d others: %s", file, prefix, groups.total(), listed)


def _check_supported(names: Iterable[str], file: str) -> None:
    for pattern, found in _UNSUPPORTED.items():
        if name := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"{file}: tensor {name}: expected the plain weights of a model, got {found}")


def _unknown_names(names: Iterable[str], file: str) -> str:
    timm = next((name for name in names if "visual.trunk." in name), None)
    found = f"an unsupported timm tower ({timm})" if timm else f"names such as {', '.join(sorted(names)[:4])}"
    expected = ", ".join(naming.title for naming in NAMINGS)
    return f"{file}: expected tensors of CLIP, CLIPA, SigLIP or LiT by the names of {expected}, got {found}"
