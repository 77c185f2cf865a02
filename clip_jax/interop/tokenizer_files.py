"""The tokenizer of a directory, with the ids of transformers' AutoTokenizer, or an error with the file and the key.

Several files define a tokenizer: tokenizer.json, or vocab.json and merges.txt, or a SentencePiece model; the class and
settings in tokenizer_config.json; more tokens in special_tokens_map.json and added_tokens.json. Weights carry one file,
so the others are merged into a tokenizer.json: added tokens, the side of padding and truncation, and the normalizer of
classes that replace the file's. OpenAI's vocabulary becomes `clip_bpe`, which needs no library.

Source: transformers 5 `tokenization_utils_base.py` (`_from_pretrained`), `tokenization_utils_tokenizers.py`,
`tokenization_auto.py`, and the classes of tokenizer_classes.py. Deviations: OpenAI's vocabulary has OpenAI's cleaning
and padding, and `do_lower_case` of GemmaTokenizer is obeyed: SigLIP 2's repositories set it, and its training
lower-cases.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from clip_jax import config as configs
from clip_jax.config import Architecture, TokenizerConfig
from clip_jax.interop import config_files
from clip_jax.interop.tokenizer_classes import CLIP_PARTS, REBUILT
from clip_jax.tokenizers import ClipBPE, fairseq_vocab_size
from clip_jax.tokenizers.base import read_file
from clip_jax.tokenizers.bpe import END, MAX_VOCAB_SIZE, START
from clip_jax.tokenizers.file_tokenizer import added_token, load_tokenizer_json, piece_ids

# Fields of TokenizerConfig that clip_jax writes into tokenizer_config.json, under the key 'clip_jax'.
OWN_SETTINGS = ("clean", "pad_id", "keep_end")
_SENTENCEPIECE = {"spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}
_AS_STORED = {"PreTrainedTokenizer", "TokenizersBackend", ""}  # classes that use tokenizer.json as it is
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EMPTY = dict.fromkeys(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"])


def of_path(path: str, model: Architecture) -> TokenizerConfig:
    """Return the tokenizer in a file given by hand, a tokenizer.json or a SentencePiece model.

    Raises:
      ValueError: if the file is missing, or if a SentencePiece model may have its own ids or fairseq's.
    """
    default = configs.tokenizer_of(model)
    if path.endswith(".json"):
        return dataclasses.replace(default, name="huggingface", path=path)
    vocab_size, fairseq = model.text.vocab_size, fairseq_vocab_size(read_file(path))
    if fairseq - 2 < vocab_size <= 1.05 * fairseq and vocab_size != fairseq:
        raise ValueError(
            f"tokenizer={path!r}: expected {fairseq - 2:,} tokens for the model's own ids or {fairseq:,} for XLM-R's,"
            f" got a text tower with {vocab_size:,}; name them: tokenizer=TokenizerConfig('sentencepiece' or"
            f" 'xlm_roberta', {path!r})"
        )
    return dataclasses.replace(default, name="xlm_roberta" if vocab_size == fairseq else "sentencepiece", path=path)


def read(folder: pathlib.Path, model: Architecture, settings: TokenizerConfig | None = None) -> _Found:
    """Return the tokenizer in a directory, and the content of its file unless it is OpenAI's published one.

    Args:
      settings: cleaning and padding of weights whose directory is not Hugging Face's; None for transformers'.

    Raises:
      ValueError: for a tokenizer class or setting that clip_jax does not support, with the file and the key.
    """
    declared = _Declared.read(folder)
    declared.check(model)
    default = settings or (configs.tokenizer_of(model) if declared.is_empty else TokenizerConfig())
    own = declared.settings.get("clip_jax") or {}
    own = {key: own[key] for key in OWN_SETTINGS if key in own}
    spm = next((name for name in sorted(_SENTENCEPIECE) if (folder / name).is_file()), "")
    stored = _stored(folder, declared)
    if spm and (stored is None or declared.cls in ("SiglipTokenizer", "")):
        config, content = _sentencepiece(folder / spm, declared, default, settings is not None)
        return dataclasses.replace(config, **own), content
    if stored is None:
        return _without_vocabulary(folder, model)
    file, pad_id = _merged(stored, declared)
    # OpenAI's cleaning is 'whitespace' before a lower-casing tokenizer.
    as_openai = settings is None or (settings.clean in ("none", "lower", "whitespace") and settings.keep_end)
    if as_openai and model.text.vocab_size == MAX_VOCAB_SIZE and _is_published(file):
        return TokenizerConfig(), b""
    if as_openai and settings and not (folder / "tokenizer.json").is_file():
        merges = (folder / "merges.txt").read_bytes()
        if _is_clip_bpe(file, merges):
            return TokenizerConfig("clip_bpe", "merges.txt"), merges
    clean = "lower" if declared.lowers_gemma and default.clean == "none" else default.clean
    pad_id = default.pad_id if pad_id is None else pad_id
    config = dataclasses.replace(default, name="huggingface", path="tokenizer.json", clean=clean, pad_id=pad_id)
    config = dataclasses.replace(config, **own)
    unchanged = declared.stored == file
    content = (folder / "tokenizer.json").read_bytes() if unchanged else json.dumps(file, ensure_ascii=False).encode()
    return config, content


_Found = tuple[TokenizerConfig, bytes]


@dataclasses.dataclass(frozen=True)
class _Declared:
    """Content of tokenizer_config.json, special_tokens_map.json, added_tokens.json and tokenizer.json."""

    file: pathlib.Path
    settings: Mapping[str, Any]
    added: Mapping[int, Mapping[str, Any]]  # added tokens by id, with those of tokenizer.json
    cls: str  # without 'Fast'; '' if no file names a class
    is_empty: bool  # there is no tokenizer_config.json
    stored: Mapping[str, Any]  # tokenizer.json, tens of MB in multilingual models; {} without one

    @staticmethod
    def read(folder: pathlib.Path) -> _Declared:
        file = folder / "tokenizer_config.json"
        settings = _json(file)
        config = _json(folder / "config.json")
        cls = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
        stored = _json(folder / "tokenizer.json")
        if not cls and config.get("model_type") == "siglip" and not stored:
            cls = "SiglipTokenizer"
        is_bpe = stored.get("model", {}).get("type") == "BPE" if stored else (folder / "vocab.json").is_file()
        if not cls and is_bpe and (config.get("model_type") == "clip" or not stored):
            cls = "CLIPTokenizer"
        if "added_tokens_decoder" in settings:
            added = {int(number): token for number, token in settings["added_tokens_decoder"].items()}
        else:
            settings |= _json(folder / "special_tokens_map.json")
            special = {_content(settings[key]) for key in _NAMED if settings.get(key)}
            added = {
                number: _token(text, special=text in special, normalized=text not in special)
                for text, number in _json(folder / "added_tokens.json").items()
            }
            added |= {token["id"]: token for token in stored.get("added_tokens", [])}
        return _Declared(file, settings, added, cls.removesuffix("Fast"), not file.is_file(), stored)

    def check(self, model: Architecture) -> None:
        """Raise ValueError for a setting that would be ignored."""
        known = [*sorted(_AS_STORED - {""}), *REBUILT, "SiglipTokenizer"]
        if self.cls not in (*known, ""):
            raise self.error("tokenizer_class", f"one of {', '.join(known)} for clip_jax", self.cls)
        if self.settings.get("split_special_tokens"):
            raise self.error("split_special_tokens", "false for clip_jax", True)
        limit = self.settings.get("model_max_length") or model.text.context_length
        if limit < model.text.context_length:
            raise self.error("model_max_length", f"at least the {model.text.context_length} tokens of the model", limit)
        if self.settings.get("padding_side") == "left" and model.text.pool == "end":
            raise self.error("padding_side", "'right' for a text tower that pools at its end token", "left")

    def error(self, key: str, expected: str, got: Any) -> ValueError:
        return ValueError(
            f"{self.file}: {key}: expected {expected}, got {got!r}; give another tokenizer, e.g."
            " load(…, tokenizer='tokenizer.json')"
        )

    @property
    def lowers_gemma(self) -> bool:
        return self.cls == "GemmaTokenizer" and bool(self.settings.get("do_lower_case"))

    def special_tokens(self) -> dict[str, str]:
        """Return the named special tokens, with the defaults of the class."""
        defaults = REBUILT[self.cls].tokens if self.cls in REBUILT else {}
        given = {key: _content(self.settings[key]) for key in self.settings if self._is_token(key)}
        known = {**defaults, **given}
        return {key: known[key] for key in [*_NAMED, *given] if key in known}

    def _is_token(self, key: str) -> bool:
        return key.endswith("_token") and isinstance(self.settings[key], (str, Mapping))

    def extra_tokens(self) -> list[Any]:
        """Return the additional special tokens."""
        extra = self.settings.get("extra_special_tokens") or self.settings.get("additional_special_tokens") or []
        return list(extra.values()) if isinstance(extra, Mapping) else list(extra)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _token(token: Any, **flags: bool) -> dict[str, Any]:
    """Return an added token with all its flags; a string is a special token."""
    default = dict.fromkeys(_FLAGS, False) | {"special": True}
    given = {flag: token[flag] for flag in _FLAGS if flag in token} if isinstance(token, Mapping) else {}
    return {"content": _content(token)} | default | given | flags


def _json(file: pathlib.Path) -> dict[str, Any]:
    """Return the content of a JSON object, {} if there is no such file."""
    return config_files.read_json(file) if file.is_file() else {}


def _stored(folder: pathlib.Path, declared: _Declared) -> dict[str, Any] | None:
    """Return tokenizer.json, or one made of vocab.json and merges.txt; None without both."""
    if declared.stored:
        return dict(declared.stored)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocabulary.is_file() or not merges.is_file():
        return None
    if declared.cls not in ("CLIPTokenizer", ""):
        raise declared.error("tokenizer_class", "CLIPTokenizer with vocab.json and merges.txt", declared.cls)
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return _EMPTY | {"version": "1.0", "model": {"type": "BPE", "vocab": _json(vocabulary), "merges": pairs}}


# ------------------------------------------------------------------------------------------------- tokenizer.json


def _merged(stored: dict[str, Any], declared: _Declared) -> tuple[dict[str, Any], int | None]:
    """Return a tokenizer.json with everything that the other files declare, and the padding id if they name one."""
    settings, special = declared.settings, declared.special_tokens()
    rebuilt, file, padding = REBUILT.get(declared.cls), dict(stored), stored.get("padding") or {}
    if rebuilt:
        if (kind := file["model"].get("type", rebuilt.model)) != rebuilt.model:
            raise declared.error("tokenizer_class", f"a class for the {kind} model of tokenizer.json", declared.cls)
        unk = {"unk_token": special["unk_token"]} if rebuilt.model != "Unigram" else {}
        file |= {"model": file["model"] | rebuilt.options | unk, "added_tokens": []}
        file |= rebuilt.parts(stored, settings)
    elif settings.get("do_lower_case") and not _lowers(file["normalizer"]):
        raise declared.error("do_lower_case", "false for a tokenizer.json that does not lower-case", True)
    tokens = [_token(declared.added[number]) for number in sorted(declared.added)]
    named = [_token(settings.get(key, token), special=True) for key, token in special.items()]
    extra = [_token(token) for token in declared.extra_tokens()]
    template = rebuilt.template if rebuilt else None
    file, ids = _with_tokens(file | ({"post_processor": None} if template else {}), tokens, [*named, *extra])
    if template:
        file["post_processor"] = _template([special.get(key, "") for key in template], ids)
    pad, truncation = special.get("pad_token", padding.get("pad_token")), stored.get("truncation") or {}
    default = rebuilt.padding_side if rebuilt else "right"
    pad_side = settings.get("padding_side") or padding.get("direction") or default
    cut_side = settings.get("truncation_side") or truncation.get("direction") or "right"
    pad_left = _PADDING | {"pad_id": ids.get(pad, 0), "pad_token": pad or ""}
    file |= {"padding": pad_left if pad_side.lower() == "left" else None}
    file |= {"truncation": _TRUNCATION if cut_side.lower() == "left" else None}
    return file, ids[pad] if pad else None


_PADDING = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_type_id": 0}
_TRUNCATION = {"direction": "Left", "max_length": 512, "strategy": "LongestFirst", "stride": 0}  # of any length


def _lowers(normalizer: Mapping[str, Any] | None) -> bool:
    members = (normalizer or {}).get("normalizers", [normalizer or {}])
    return any(member.get("type") == "Lowercase" or member.get("lowercase") for member in members)


def _with_tokens(
    file: dict[str, Any], tokens: list[dict[str, Any]], special: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Add tokens, and special tokens that are not among them; return tokenizer.json and ids by token."""
    present = [_token(token) for token in file.setdefault("added_tokens", [])]
    missing = [token for token in tokens if token not in present]
    names = {token["content"] for token in [*present, *missing]}
    for token in special:
        if token["content"] not in names:
            missing.append(token)
            names.add(token["content"])
    if missing:
        tokenizer = load_tokenizer_json(json.dumps(file).encode(), "tokenizer.json")
        tokenizer.add_tokens([added_token(**token) for token in missing])
        file = json.loads(tokenizer.to_str())
    vocabulary = file["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return file, vocabulary | {token["content"]: token["id"] for token in file["added_tokens"]}


def _template(tokens: list[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts special tokens around a text, which is ''."""
    parts = [
        {"SpecialToken": {"id": token, "type_id": 0}} if token else {"Sequence": {"id": "A", "type_id": 0}}
        for token in tokens
    ]
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens if token}
    pair = [{"Sequence": {"id": text, "type_id": number}} for number, text in enumerate("AB")]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}


def _is_published(file: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json is OpenAI's: its vocabulary and merges, the parts of CLIPTokenizer, its sides."""
    vocabulary, merges = ClipBPE().as_huggingface()
    model, added, post = file["model"], file["added_tokens"], file["post_processor"] or {}
    if len(model["vocab"]) + len(added) < MAX_VOCAB_SIZE or not isinstance(model["vocab"], dict):
        return False
    ends = {"sep": [END, vocabulary[END]], "cls": [START, vocabulary[START]]}
    return (
        model["vocab"] | {token["content"]: token["id"] for token in added} == vocabulary
        and {token["content"] for token in added} <= {START, END}
        and [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])] == merges
        and all(file[key] == part for key, part in CLIP_PARTS.items())
        and (post == _template([START, "", END], vocabulary) or {key: post.get(key) for key in ends} == ends)
        and not file["padding"]
        and not file["truncation"]
    )


def _is_clip_bpe(file: Mapping[str, Any], merges: bytes) -> bool:
    """Return whether vocab.json has the ids that `clip_bpe` has with merges.txt."""
    size = len(file["model"]["vocab"])
    try:
        return ClipBPE(vocab_size=size, merges_path=merges).as_huggingface()[0] == file["model"]["vocab"]
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------- other vocabularies


def _sentencepiece(path: pathlib.Path, declared: _Declared, default: TokenizerConfig, open_clip: bool) -> _Found:
    """Return the tokenizer of a SentencePiece model."""
    content, settings, cls = read_file(path), declared.settings, declared.cls
    fairseq = cls == "XLMRobertaTokenizer" or (not cls and path.name == "sentencepiece.bpe.model")
    if not fairseq and cls not in ("SiglipTokenizer", "T5Tokenizer", ""):
        raise declared.error("tokenizer_class", "a class for a SentencePiece model without tokenizer.json", cls)
    expected = {"padding_side": "right", "truncation_side": "right", "sp_model_kwargs": {}}
    expected |= {"do_lower_case": True} if cls == "SiglipTokenizer" else {"add_prefix_space": True} if fairseq else {}
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise declared.error(key, f"{value!r} with {path.name}", settings[key])
    name = "xlm_roberta" if fairseq else "sentencepiece"
    ids = piece_ids(content, name)
    special = declared.special_tokens()
    added = [
        *special.values(),
        *map(_content, declared.added.values()),
        *map(_content, declared.extra_tokens()),
    ]
    if unknown := [token for token in added if token not in ids]:
        raise declared.error("added_tokens", f"tokens of {path.name}", unknown[0])
    clean, pad = default.clean, special.get("pad_token", "</s>" if cls == "SiglipTokenizer" else "")
    if cls == "SiglipTokenizer" and clean != "canonicalize":  # which contains its cleaning
        if open_clip:
            raise declared.error("tokenizer_class", f"another than SiglipTokenizer with clean={clean!r}", cls)
        clean = "no_punctuation"
    pad_id = ids[pad] if pad else default.pad_id
    return dataclasses.replace(default, name=name, path=path.name, clean=clean, pad_id=pad_id), content


def _without_vocabulary(folder: pathlib.Path, model: Architecture) -> _Found:
    """Return the tokenizer of a directory with merges.txt alone, or the one that the model's published weights have."""
    clip_vocabulary, merges = model.text.vocab_size == MAX_VOCAB_SIZE, folder / "merges.txt"
    if merges.is_file():
        content = merges.read_bytes()
        lines = content.decode("utf-8", "replace").split("\n")[1:-1]
        published = clip_vocabulary and lines == ClipBPE().as_huggingface()[1]
        return (TokenizerConfig(), b"") if published else (TokenizerConfig("clip_bpe", merges.name), content)
    config = configs.tokenizer_of(model)
    unknown = config.name == "clip_bpe" and not clip_vocabulary
    return (TokenizerConfig("sentencepiece") if unknown else config), b""
