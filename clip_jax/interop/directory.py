"""One directory that others load unaided: transformers 5 and 4.57, open_clip (`local-dir:`) and OpenAI's `clip.load`.

Each has its own names for the same weights, so they lie there up to three times, float32:

    config.json, model.safetensors, preprocessor_config.json, vocab.json, merges.txt, tokenizer_config.json,
    special_tokens_map.json                             transformers: CLIPModel or SiglipModel .from_pretrained(dir)
    open_clip_config.json, open_clip_model.safetensors  open_clip: 'local-dir:' + dir
    clip.pt                                             OpenAI's: clip.load(dir + '/clip.pt'), which rounds to float16

What a project has no form for is left out, and why is returned.

Source: transformers `modeling_utils.py`, `tokenization_clip.py`; open_clip `factory.py`; openai/CLIP `clip/clip.py`.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.config import Architecture, ResNet, TextTransformer, ViT, WeightsConfig
from clip_jax.interop import conversion, huggingface, name_tables, open_clip, safetensors, torch_file
from clip_jax.interop.msgpack import tokenizer_content
from clip_jax.tokenizers import ClipBPE, HuggingFace
from clip_jax.typing import Params


def write(path: str | os.PathLike[str], params: Params, config: WeightsConfig) -> dict[str, str]:
    """Write a directory that is there in full or not at all, and return what became of each project's part.

    Returns:
      For 'transformers', 'open_clip' and 'clip.load': how to load it, or why it was left out.

    Raises:
      ValueError: if the directory exists and isn't empty, or none of the projects has such a model.
    """
    target = pathlib.Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists; give a directory that doesn't, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        said, written = {}, 0
        for project, part in _PARTS.items():
            try:
                part(unfinished, params, config)
                said[project] = _HOW[project].format(target)
                written += 1
            except _LeftOut as reason:
                said[project] = f"left out: {reason}"
        if not written:
            raise ValueError("; ".join(f"{project}: {reason}" for project, reason in said.items()))
        _write_tokenizer(unfinished, config)
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return said


class _LeftOut(Exception):
    """A project has no form for the model."""


def _transformers(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    model = config.model
    try:
        content = huggingface.config(model)
    except ValueError as error:
        raise _LeftOut(error) from error
    siglip = content["model_type"] == "siglip"
    table = name_tables.HUGGINGFACE_SIGLIP if siglip else name_tables.HUGGINGFACE
    safetensors.write(folder / "model.safetensors", conversion.LazyTensors(model, params, table))
    _write_json(folder / "config.json", content)
    processor = huggingface.preprocessor_config(config.preprocess, model.image.image_size, siglip)
    _write_json(folder / "preprocessor_config.json", processor)


def _open_clip(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    try:
        content = open_clip.config(config.model, config.preprocess, config.tokenizer)
    except ValueError as error:
        raise _LeftOut(error) from error
    siglip = getattr(config.model.image, "pool", "") == "attention"
    table = name_tables.OPEN_CLIP_SIGLIP if siglip else name_tables.OPENAI
    safetensors.write(folder / "open_clip_model.safetensors", conversion.LazyTensors(config.model, params, table))
    _write_json(folder / "open_clip_config.json", content)


def _write_tokenizer(folder: pathlib.Path, config: WeightsConfig) -> None:
    """Write the tokenizer for transformers, which open_clip asks too where it isn't CLIP's own."""
    text, content = config.model.text, tokenizer_content(config)
    settings: dict[str, Any] = {"model_max_length": text.length}
    if config.tokenizer.name == "clip_bpe":
        bpe = ClipBPE(text.length, text.vocab_size, merges_path=content)
        vocabulary, merges = bpe.as_huggingface()
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        _write_json(folder / "vocab.json", vocabulary)
        special, kind = huggingface.special_tokens("<|startoftext|>", "<|endoftext|>"), "CLIPTokenizer"
        settings |= {"do_lower_case": True}
    elif not content:
        return
    elif config.tokenizer.name == "sentencepiece":
        (folder / "spiece.model").write_bytes(content)
        special, kind = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}, "SiglipTokenizer"
    else:
        (folder / "tokenizer.json").write_bytes(content)
        tokenizer = HuggingFace(content, text.length, pad_id=config.tokenizer.pad_id)
        end, padding = tokenizer.token(tokenizer.eos_id), tokenizer.token(tokenizer.pad_id)
        special, kind = {"pad_token": padding, "eos_token": end, "sep_token": end}, "PreTrainedTokenizerFast"
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind} | settings | special)


def _clip_load(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    """Write what OpenAI's `build_model` reads: it takes all but the sizes for granted."""
    model = config.model
    towers = (model.image, model.text) if model.image.kind != "edges" else ()
    if Architecture(*map(_granted, towers), embed_dim=model.embed_dim) != model:
        raise _LeftOut("OpenAI's code has QuickGELU, heads of 64, a class token and CLIP's own vocabulary, and no more")
    torch_file.write(folder / "clip.pt", conversion.LazyTensors(config.model, params, name_tables.OPENAI))


def _granted(tower: ViT | ResNet | TextTransformer) -> ViT | ResNet | TextTransformer:
    """Return the tower of this size that OpenAI's code would build."""
    if tower.kind == "resnet":
        return ResNet(tower.image_size, tower.width, tower.layers, tower.width // 2)
    size = {"width": tower.width, "layers": tower.layers, "heads": max(1, tower.width // 64)}
    if tower.kind == "vit":
        return ViT(tower.image_size, tower.patch_size, **size)
    return TextTransformer(tower.vocab_size, tower.length, tower.vocab_size - 1, **size)


_PARTS: Mapping[str, Callable[[pathlib.Path, Params, WeightsConfig], None]] = {
    "transformers": _transformers,
    "open_clip": _open_clip,
    "clip.load": _clip_load,
}
_HOW = {
    "transformers": "AutoModel.from_pretrained('{0}')",
    "open_clip": "open_clip.create_model_from_pretrained('local-dir:{0}')",
    "clip.load": "clip.load('{0}/clip.pt')",
}


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
