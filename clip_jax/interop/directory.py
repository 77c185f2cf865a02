"""Directory for other libraries: transformers 5 and 4.57, open_clip (`local-dir:`) and OpenAI's `clip.load` load it.

Each has its own tensor names, so a directory contains the weights up to three times, in float32:

    config.json, model.safetensors, preprocessor_config.json, vocab.json, merges.txt, tokenizer_config.json,
    special_tokens_map.json                             transformers: AutoModel.from_pretrained(dir)
    open_clip_config.json, open_clip_model.safetensors  open_clip: 'local-dir:' + dir
    clip.pt                                             OpenAI: clip.load(dir + '/clip.pt'), which rounds to float16
    README.md                                           a model card: how to load it, and differences of the pixels
    clip_jax_config.json                                the preprocessing that the other libraries do not have

A library that does not have the model is skipped, and the reason is returned. Sources: transformers
`modeling_utils.py`, `tokenization_clip.py`; open_clip `factory.py`; openai/CLIP `clip/clip.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clip_jax.config import PREPROCESS, Preprocess, ResNet, TextTransformer, ViT, WeightsConfig, name_of
from clip_jax.interop import (
    conversion,
    huggingface,
    image_processor,
    name_tables,
    open_clip,
    pixel_differences,
    safetensors,
    tokenizer_files,
    torch_file,
)
from clip_jax.interop.msgpack import tokenizer_content
from clip_jax.paths import check_local, errors_naming
from clip_jax.tokenizers import ClipBPE, HuggingFace, SentencePiece, XlmRoberta
from clip_jax.tokenizers.bpe import END, START
from clip_jax.tokenizers.file_tokenizer import piece_ids
from clip_jax.typing import Params

# In order of preference, which is open_clip's: its own files first.
WEIGHT_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("flax_model.msgpack", "flax_model.msgpack.index.json"),
)


_CONFIG = "clip_jax_config.json"
_PIXELS = (
    "clip_jax composites transparent images on white and rounds crop offsets half to even; open_clip and clip.load drop"
    " the transparency, transformers rounds crop offsets down. For equal features give them opaque images that have the"
    " model's size, or use clip_jax.load, which restores the preprocessing"
)
_IMPLEMENTATIONS = {"transformers": "huggingface", "open_clip": "openai", "clip.load": "openai"}
SENTENCE_TRANSFORMERS = "[0-9]_CLIPModel"  # subdirectory of the model in the layout of sentence-transformers


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a directory contains a file of `WEIGHT_FILES`."""
    return path.is_dir() and any((path / name).is_file() for name in WEIGHT_FILES)


def weight_file(folder: pathlib.Path) -> pathlib.Path:
    """Return the file that the weights of a directory are read from. Raises ValueError if there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: {without_weights([file.name for file in folder.iterdir()], folder)}")


_OTHER_WEIGHTS = re.compile(r".*(?<!training_args)\.(safetensors|bin|pt|pth|msgpack|npz|index\.\w+\.json)")
_SHARD = re.compile(r".*-\d+-of-(?!0*1\.)\d+\.\w+")


def check_whole(file: pathlib.Path) -> None:
    """Raise ValueError for one of several shards, by its name."""
    if _SHARD.fullmatch(file.name):
        raise ValueError(f"{file}: expected all weights, got one shard; give its index, *.index.json, or the directory")


def without_weights(files: Sequence[str], folder: str | os.PathLike[str]) -> str:
    """Return the message for a directory with these files, none of which is in `WEIGHT_FILES`, and what to do."""
    expected = f"expected a directory with one of {', '.join(WEIGHT_FILES)}"
    if "adapter_config.json" in files:
        return (
            "expected the weights of a model, got an adapter of PEFT, which changes those of another; merge them with"
            f" PeftModel.from_pretrained(model, {os.fspath(folder)!r}).merge_and_unload().save_pretrained(NEW)"
        )
    others = [file for file in sorted(files) if _OTHER_WEIGHTS.fullmatch(file) and not _SHARD.fullmatch(file)]
    if others:
        return f"{expected}, got {', '.join(others)}; give the file, e.g. {os.path.join(folder, others[0])}"
    return f"{expected}, got {', '.join(sorted(files)[:8]) or 'an empty one'}; give another"


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    """Return the directory of the weights: `folder`, or its subdirectory in the layout of sentence-transformers."""
    nested = sorted(path for path in folder.glob(SENTENCE_TRANSFORMERS) if detect(path, b""))
    return nested[0] if nested and not detect(folder, b"") else folder


def write(path: str | os.PathLike[str], params: Params, config: WeightsConfig) -> dict[str, str]:
    """Write a directory atomically. Raises ValueError if it exists and is not empty, or if no library has the model.

    Returns:
      For 'transformers', 'open_clip' and 'clip.load' the call that loads the model, or 'skipped: ' and the reason; as
      'pixels' the differences of their preprocessing from that of a model trained by clip_jax.
    """
    check_local("path", path)
    target = pathlib.Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected a new or empty directory, got an existing one; give another path")
    with errors_naming(target):
        return _write(target, params, config)


def _write(target: pathlib.Path, params: Params, config: WeightsConfig) -> dict[str, str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    report, written = {}, False
    try:
        for library, (write_files, usage) in _LIBRARIES.items():
            files = set(unfinished.iterdir())
            try:
                write_files(unfinished, params, config)
            except ValueError as reason:
                if set(unfinished.iterdir()) != files:
                    raise
                report[library] = f"skipped: {reason}"
            else:
                report[library], written = usage.format(target), True
        if not written:
            raise ValueError("; ".join(f"{library}: {reason}" for library, reason in report.items()))
        _write_tokenizer(unfinished, config)
        if config.preprocess.implementation == "clip_jax":
            report["pixels"] = f"{_PIXELS}. {_measured(params, config, report)}"
            _write_json(unfinished / _CONFIG, {"preprocess": {"implementation": "clip_jax"}})
        (unfinished / "README.md").write_text(_model_card(report, config), encoding="utf-8")
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return report


def _measured(params: Params, config: WeightsConfig, report: Mapping[str, str]) -> str:
    """Return the effect of the libraries' preprocessing on the embeddings, for the libraries that have the model."""
    cosines, count = pixel_differences.lowest_cosines(params, config), pixel_differences.IMAGES
    written = [library for library in _IMPLEMENTATIONS if not report[library].startswith("skipped")]
    values = ["{} {:.4f} and {:.4f}".format(library, *cosines[_IMPLEMENTATIONS[library]]) for library in written]
    return (
        f"Lowest cosine between the features of clip_jax and those from their pixels, over {count} opaque and"
        f" {count} transparent synthetic images of other sizes: {', '.join(values)}"
    )


def restored(folder: pathlib.Path, spec: Preprocess) -> Preprocess:
    """Return the preprocessing of a directory with the implementation of the model that `write` got.

    Raises ValueError for another content of clip_jax_config.json than that of `write`.
    """
    if not (file := folder / _CONFIG).is_file():
        return spec
    content = file.read_text(encoding="utf-8")
    if "".join(content.split()) != '{"preprocess":{"implementation":"clip_jax"}}':
        raise ValueError(f"{file}: expected preprocess.implementation 'clip_jax' alone, got {content!r}; remove it")
    return dataclasses.replace(spec, implementation="clip_jax")


def _model_card(report: Mapping[str, str], config: WeightsConfig) -> str:
    calls = [f"- {library}: {call}" for library, call in report.items() if library != "pixels"]
    lines = [
        f"# {name_of(config.model)}",
        "",
        f"Weights: {config.source or 'of clip_jax'}. Load them with:",
        "",
        *calls,
    ]
    lines += ["- clip_jax: `clip_jax.load` of this directory"]
    lines += ["", "## Preprocessing", "", f"{report['pixels']}."] if "pixels" in report else []
    return "\n".join(lines) + "\n"


# The writers of libraries raise ValueError for a model that the library does not have, before they write a file.


def _write_transformers(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    model, content = config.model, huggingface.config(config.model)
    siglip = content["model_type"] == "siglip"
    processor = image_processor.write(config.preprocess, model.image.image_size, siglip)
    table = name_tables.HUGGINGFACE_SIGLIP if siglip else name_tables.HUGGINGFACE
    safetensors.write(folder / "model.safetensors", conversion.LazyTensors(model, params, table))
    _write_json(folder / "config.json", content)
    _write_json(folder / "preprocessor_config.json", processor)


def _write_open_clip(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    content = open_clip.config(config.model, config.preprocess, config.tokenizer)
    timm = "timm_model_name" in content["model_cfg"]["vision_cfg"]
    table = name_tables.OPEN_CLIP_SIGLIP if timm else name_tables.OPENAI
    safetensors.write(folder / "open_clip_model.safetensors", conversion.LazyTensors(config.model, params, table))
    _write_json(folder / "open_clip_config.json", content)


def _write_clip(folder: pathlib.Path, params: Params, config: WeightsConfig) -> None:
    """Write the file that OpenAI's `build_model` reads: everything but the sizes is fixed there."""
    model = config.model
    towers = [model.image, model.text]
    if [_OPENAI_TOWERS.get(type(tower), lambda _: None)(tower) for tower in towers] != towers or model.logit_bias:
        raise ValueError("OpenAI's code has QuickGELU, heads of 64, a class token and CLIP's vocabulary alone")
    if dataclasses.replace(config.preprocess, implementation="clip_jax") != PREPROCESS["openai"]:
        raise ValueError("OpenAI's code has its own preprocessing alone")
    torch_file.write(folder / "clip.pt", conversion.LazyTensors(model, params, name_tables.OPENAI))


def _openai_text(tower: TextTransformer) -> TextTransformer:
    sizes = {"width": tower.width, "layers": tower.layers, "heads": max(1, tower.width // 64)}
    return TextTransformer(tower.vocab_size, tower.context_length, tower.vocab_size - 1, **sizes)


# The tower that OpenAI's code builds for the sizes of a tower.
_OPENAI_TOWERS: dict[type, Callable[[Any], Any]] = {
    ViT: lambda tower: ViT(tower.image_size, tower.patch_size, tower.width, tower.layers, max(1, tower.width // 64)),
    ResNet: lambda tower: ResNet(tower.image_size, tower.width, tower.layers, tower.width // 2),
    TextTransformer: _openai_text,
}

_LIBRARIES: dict[str, tuple[Callable[[pathlib.Path, Params, WeightsConfig], None], str]] = {
    "transformers": (_write_transformers, "AutoModel.from_pretrained('{0}')"),
    "open_clip": (_write_open_clip, "open_clip.create_model_from_pretrained('local-dir:{0}')"),
    "clip.load": (_write_clip, "clip.load('{0}/clip.pt')"),
}


# `tokenizer.name` -> class, file and class in transformers.
_SENTENCEPIECE = {
    "sentencepiece": (SentencePiece, "spiece.model", "SiglipTokenizer"),
    "xlm_roberta": (XlmRoberta, "sentencepiece.bpe.model", "XLMRobertaTokenizer"),
}


def _write_tokenizer(folder: pathlib.Path, config: WeightsConfig) -> None:
    """Write the tokenizer for transformers; open_clip also reads it if it is not CLIP's own."""
    text, content = config.model.text, tokenizer_content(config)
    settings: dict[str, Any] = {"model_max_length": text.context_length}
    if config.tokenizer.name == "clip_bpe":
        vocabulary, merges = ClipBPE(text.context_length, text.vocab_size, merges_path=content).as_huggingface()
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        _write_json(folder / "vocab.json", vocabulary)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        name = "CLIPTokenizer"
        settings |= {"do_lower_case": True}
    elif not content:
        return
    elif config.tokenizer.name in _SENTENCEPIECE:
        cls, file, name = _SENTENCEPIECE[config.tokenizer.name]
        (folder / file).write_bytes(content)
        tokenizer = cls(content, text.context_length, pad_id=config.tokenizer.pad_id)
        pieces = list(piece_ids(content, config.tokenizer.name))
        special = {"pad_token": pieces[tokenizer.pad_id], "eos_token": pieces[tokenizer.eos_id], "unk_token": "<unk>"}
        # SiglipTokenizer removes punctuation.
        if name == "SiglipTokenizer" and config.tokenizer.clean not in ("canonicalize", "no_punctuation"):
            name = "T5Tokenizer"
    else:
        (folder / "tokenizer.json").write_bytes(content)
        tokenizer = HuggingFace(content, text.context_length, pad_id=config.tokenizer.pad_id)
        end, padding = tokenizer.token(tokenizer.eos_id), tokenizer.token(tokenizer.pad_id)
        special, name = {"pad_token": padding, "eos_token": end, "sep_token": end}, "PreTrainedTokenizerFast"
    own = {key: getattr(config.tokenizer, key) for key in tokenizer_files.OWN_SETTINGS}
    settings |= {} if config.tokenizer.name == "clip_bpe" else {"clip_jax": own}  # transformers ignores it
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": name} | settings | special)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
