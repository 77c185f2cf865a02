"""Tokenizers of directories: which files and keys are obeyed, and which are refused. Against transformers: peers/."""

import dataclasses
import json

import numpy as np
import pytest

from clip_jax.config import Architecture, TextTransformer, TokenizerConfig, ViT
from clip_jax.interop import open_clip, reading, tokenizer_files
from clip_jax.interop.directory import write
from clip_jax.tokenizers import ClipBPE, SentencePiece, XlmRoberta, make_tokenizer
from clip_jax.tokenizers.bpe import END, START
from tests import tiny_models, tiny_tokenizers
from tests.tiny_tokenizers import sentencepiece_model, tokenizer_json

TEXTS = ["A red dog.", "a red dog in the park", ""]
ENDS = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}


def _model(vocab_size, eos_id, length=12, **text):
    tower = TextTransformer(vocab_size, length, eos_id, 64, 1, 1, **text)
    return Architecture(ViT(32, 16, 64, 1, 1), tower, 32, logit_bias=tower.pool == "last")


BERT = _model(len(json.loads(tokenizer_json())["model"]["vocab"]), 3)
CLIP = _model(49_408, 49_407)


def _write(folder, **files):
    for name, content in files.items():
        name = name.replace("__", ".")
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _tokenizer(folder, model, settings=None, truncate=True):
    config, content = tokenizer_files.read(folder, model, settings)
    return make_tokenizer(config, model.text, truncate=truncate, tokenizer_file=content)


def _vocabulary(merges=lambda pairs: pairs):
    vocabulary, pairs = ClipBPE().as_huggingface()
    return vocabulary, "\n".join(["#version: 0.2", *merges(pairs), ""])


def _own_words():
    """Return a tokenizer.json of 49,408 whole words, none of them CLIP's pieces."""
    words = ["dog", "red", "a"]
    vocabulary = {words[i] if i < len(words) else f"w{i}": i for i in range(49_406)} | {START: 49_406, END: 49_407}
    file = json.loads(tokenizer_json()) | {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END}}
    ends = {"type": "RobertaProcessing", "sep": [END, 49_407], "cls": [START, 49_406]}
    added = [tokenizer_files._token(token) | {"id": vocabulary[token]} for token in (START, END)]
    post = ends | {"trim_offsets": False, "add_prefix_space": False}
    return file | {"normalizer": {"type": "Lowercase"}, "post_processor": post, "added_tokens": added}


# ----------------------------------------------------------------------------------------------- which tokenizer


def test_own_tokenizer_json_of_49408_tokens_is_used(tmp_path):
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | ENDS
    _write(tmp_path, tokenizer__json=_own_words(), tokenizer_config__json=content)
    row = _tokenizer(tmp_path, CLIP)(["A red dog"])[0].tolist()
    assert row == [49_406, 2, 1, 0, *[49_407] * 8]


@pytest.mark.parametrize("layout", ["vocab and merges", "tokenizer.json", "without a class"])
def test_openai_s_vocabulary_is_clip_bpe(tmp_path, layout):
    vocabulary, merges = _vocabulary()
    content = {"tokenizer_class": "CLIPTokenizer"} | ENDS if layout != "without a class" else {}
    _write(tmp_path, config__json={"model_type": "clip"})
    if content:
        _write(tmp_path, tokenizer_config__json=content)
    if layout == "vocab and merges":
        _write(tmp_path, vocab__json=vocabulary, merges__txt=merges)
    else:
        pairs = [line.split() for line in merges.split("\n")[1:-1]]
        file = _own_words() | {"model": {"type": "BPE", "vocab": vocabulary, "merges": pairs}}
        _write(tmp_path, tokenizer__json=file)
    assert tokenizer_files.read(tmp_path, CLIP) == (TokenizerConfig(), b"")


def test_other_merges_and_other_tokens_are_not_clip_bpe(tmp_path):
    exchanged = _vocabulary(lambda pairs: [pairs[1], pairs[0], *pairs[2:]])
    _write(tmp_path, vocab__json=exchanged[0], merges__txt=exchanged[1])
    _write(tmp_path, tokenizer_config__json={"tokenizer_class": "CLIPTokenizer"} | ENDS)
    assert tokenizer_files.read(tmp_path, CLIP)[0].name == "huggingface"
    _write(tmp_path, merges__txt=_vocabulary()[1])
    assert tokenizer_files.read(tmp_path, CLIP)[0].name == "clip_bpe"
    # '!' as padding is a token of its own: '!!' is no longer one piece.
    _write(tmp_path, tokenizer_config__json={"tokenizer_class": "CLIPTokenizer"} | ENDS | {"pad_token": "!"})
    own = _tokenizer(tmp_path, CLIP)
    assert own.pad_id == 0 and own(["dog!!"])[0, :5].tolist() == [49_406, 1929, 0, 0, 49_407]


def test_open_clip_without_hf_tokenizer_name_has_clip_s(tmp_path):
    assert open_clip.tokenizer({"text_cfg": {}}, CLIP) is None
    kwargs = {"text_cfg": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "canonicalize"}}}
    assert open_clip.tokenizer(kwargs, CLIP).clean == "canonicalize"
    for wrong in ({"tokenizer_kwargs": {"clean": "canonicalize"}}, {"tokenizer_mode": "clips"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected none"):
            open_clip.tokenizer({"text_cfg": wrong}, CLIP)
    with pytest.raises(ValueError, match=r"tokenizer_kwargs\.language: expected a key that clip_jax supports"):
        open_clip.tokenizer({"text_cfg": {"tokenizer_kwargs": {"language": "de"}}}, CLIP)


# ----------------------------------------------------------------------------------------------------- its settings


def _bert(folder, **settings):
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "[SEP]"} | settings
    return _write(folder, tokenizer__json=tokenizer_json(), tokenizer_config__json=content)


def test_sides_of_padding_and_truncation_are_obeyed(tmp_path):
    last = _model(BERT.text.vocab_size, 3, 6, pool="last", causal=False)
    plain = _tokenizer(_bert(tmp_path), last)(["red dog", "a red dog in the park"]).tolist()
    cut = _tokenizer(_bert(tmp_path, truncation_side="left"), last)(["red dog", "a red dog in the park"]).tolist()
    padded = _tokenizer(_bert(tmp_path, padding_side="left"), last)(["red dog"]).tolist()
    longer = _tokenizer(_bert(tmp_path), dataclasses.replace(last, text=BERT.text))([TEXTS[1]])[0].tolist()
    end = longer.index(3)
    assert plain[0] == cut[0] and plain[1] == [*longer[:5], 3] and cut[1] == [2, *longer[end - 4 : end], 3]
    count = sum(token != 0 for token in plain[0])
    assert padded[0] == [*[0] * (6 - count), *plain[0][:count]] and padded[0] != plain[0]


def test_too_long_texts_raise_unless_truncated(tmp_path):
    short = _model(BERT.text.vocab_size, 3, 5)
    with pytest.raises(ValueError, match=r"model\.text\.context_length=5"):
        _tokenizer(_bert(tmp_path, truncation_side="left"), short, truncate=False)([TEXTS[1]])


def test_pad_token_and_added_tokens_are_obeyed(tmp_path):
    token = {"content": "zebra!", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    size = BERT.text.vocab_size
    folder = _bert(tmp_path, pad_token="[UNK]", added_tokens_decoder={str(size): token})
    tokenizer = _tokenizer(folder, _model(size + 1, 3))
    assert tokenizer.pad_id == 1 and tokenizer(["red zebra!"])[0, 2] == size
    _bert(tmp_path)
    _write(tmp_path, added_tokens__json={"zebra!": size}, special_tokens_map__json={"pad_token": {"content": "[CLS]"}})
    tokenizer = _tokenizer(folder, _model(size + 1, 3))
    assert tokenizer.pad_id == 2 and tokenizer(["red zebra!"])[0, 2] == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "MarianTokenizer"}, "tokenizer_class: expected one of .*BertTokenizer.*got 'MarianTok"),
        ({"tokenizer_class": "CLIPTokenizer"}, "tokenizer_class: expected a class for the WordPiece model"),
        ({"split_special_tokens": True}, "split_special_tokens: expected false for clip_jax, got True"),
        ({"model_max_length": 5}, "model_max_length: expected at least the 12 tokens of the model, got 5"),
        ({"padding_side": "left"}, "padding_side: expected 'right' for a text tower that pools at its end token"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        tokenizer_files.read(_bert(tmp_path, **settings), BERT)


def test_lower_casing_that_the_class_ignores_is_refused(tmp_path):
    file = json.loads(tokenizer_json()) | {"normalizer": None}
    _bert(tmp_path, do_lower_case=True)
    assert tokenizer_files.read(tmp_path, BERT)[0].name == "huggingface"  # the file lower-cases
    _write(tmp_path, tokenizer__json=file)
    with pytest.raises(ValueError, match="do_lower_case: expected false for a tokenizer.json that does not lower-case"):
        tokenizer_files.read(tmp_path, BERT)


def test_given_tokenizer_replaces_one_that_is_refused(tmp_path):
    folder = tmp_path / "dir"
    config = reading.WeightsConfig(tiny_models.ARCHITECTURES["vit"])
    write(folder, tiny_models.params(tiny_models.ARCHITECTURES["vit"]), config)
    _write(folder, tokenizer_config__json={"tokenizer_class": "MarianTokenizer"})
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="tokenizer_class"):
        reading.read(folder)
    assert reading.read(folder, tokenizer=TokenizerConfig()).config.tokenizer == TokenizerConfig()


# ------------------------------------------------------------------------------------------------------ SentencePiece


def test_xlm_roberta_has_fairseq_s_ids(tmp_path):
    content = sentencepiece_model()
    own, shifted = SentencePiece(content, 16)(["a red dog"])[0].tolist(), XlmRoberta(content, 16)(["a red dog"])[0]
    end = own.index(2)
    assert shifted.tolist() == [0, *(piece + 1 for piece in own[:end]), 2, *[1] * (14 - end)]
    tokenizer = XlmRoberta(content, 16)
    assert 3 in tokenizer(["犬"])[0]
    assert tokenizer.decode(shifted) == "a red dog"
    with pytest.raises(ValueError, match="expected the first pieces <unk>, <s>, </s>"):
        XlmRoberta(tiny_tokenizers.siglip_model(), 16)


LARGE = 45  # pieces; two more are within the 5 % that an embedding table may be padded by


def _large_sentencepiece_model():
    """Return a model of XLM-R's special pieces with additional pieces."""
    extra = [f"<x{number}>" for number in range(LARGE - 32)]
    return sentencepiece_model(vocab_size=LARGE, user_defined_symbols=",".join(extra))


def test_fairseq_s_ids_are_recognized_by_the_size_or_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(sentencepiece_model(vocab_size=60))
    path = str(tmp_path / "x.model")
    size = SentencePiece(path, 16).vocab_size
    assert tokenizer_files.of_path(path, _model(size, 2)).name == "sentencepiece"
    assert tokenizer_files.of_path(path, _model(size + 2, 2)).name == "xlm_roberta"
    with pytest.raises(ValueError, match=f"expected {size} tokens for the model's own ids or {size + 2} for XLM-R's"):
        tokenizer_files.of_path(path, _model(size + 1, 2))
    (tmp_path / "large.model").write_bytes(_large_sentencepiece_model())
    large = str(tmp_path / "large.model")
    with pytest.raises(ValueError, match="expected 'xlm_roberta' for a SentencePiece model that starts with <unk>"):
        make_tokenizer(TokenizerConfig("sentencepiece", large), _model(LARGE + 2, 2).text)


def test_directory_with_sentencepiece_bpe_model_is_xlm_roberta(tmp_path):
    _write(tmp_path, **{"sentencepiece.bpe.model": sentencepiece_model()})
    assert tokenizer_files.read(tmp_path, _model(34, 2))[0].name == "xlm_roberta"
    _write(tmp_path, tokenizer_config__json={"tokenizer_class": "CamembertTokenizer"})
    with pytest.raises(ValueError, match="tokenizer_class: expected one of"):
        tokenizer_files.read(tmp_path, _model(34, 2))


def test_siglip_removes_punctuation_and_its_own_pad_token_is_used(tmp_path):
    _write(tmp_path, spiece__model=tiny_tokenizers.siglip_model())
    _write(tmp_path, tokenizer_config__json={"tokenizer_class": "SiglipTokenizer", "pad_token": "<pad>"})
    size = SentencePiece(tiny_tokenizers.siglip_model(), 16).vocab_size
    model = _model(size, 1, pool="last", causal=False)
    config, _ = tokenizer_files.read(tmp_path, model)
    assert (config.clean, config.pad_id) == ("no_punctuation", 0)
    rows = _tokenizer(tmp_path, model)(["A red dog.", "a red dog"])
    np.testing.assert_array_equal(rows[0], rows[1])
    _write(tmp_path, tokenizer_config__json={"tokenizer_class": "SiglipTokenizer", "do_lower_case": False})
    with pytest.raises(ValueError, match="do_lower_case: expected True with spiece.model, got False"):
        tokenizer_files.read(tmp_path, model)


def test_siglip2_lower_cases_by_its_class_and_canonicalizes_by_open_clip(tmp_path):
    file = json.loads(tokenizer_json())
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *"abcdefghijklmnopqrstuvwxyzA"]
    model = {"type": "BPE", "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": []}
    post = tokenizer_files._template(["", "<eos>"], {"<eos>": 1})
    _write(tmp_path, tokenizer__json=file | {"model": model, "post_processor": post, "added_tokens": []})
    tower = _model(len(pieces), 1, pool="last", causal=False)
    rows = {}
    for cls, lower in (("GemmaTokenizer", False), ("GemmaTokenizer", True), ("Siglip2Tokenizer", False)):
        content = {"tokenizer_class": cls, "do_lower_case": lower, "padding_side": "right"}
        _write(tmp_path, tokenizer_config__json=content)
        rows[cls, lower] = _tokenizer(tmp_path, tower)(["A.", "a.", "a"]).tolist()
    settings = dataclasses.replace(TokenizerConfig("huggingface"), clean="canonicalize")
    rows["open_clip"] = _tokenizer(tmp_path, tower, settings)(["A.", "a.", "a"]).tolist()
    upper, point, letter = (pieces.index(piece) for piece in "A.a")
    assert [row[:2] for row in rows["GemmaTokenizer", False]] == [[upper, point], [letter, point], [letter, 1]]
    for key in (("GemmaTokenizer", True), ("Siglip2Tokenizer", False)):
        assert [row[:2] for row in rows[key]] == [[letter, point], [letter, point], [letter, 1]]
    assert [row[:2] for row in rows["open_clip"]] == [[letter, 1]] * 3


@pytest.mark.parametrize(
    ("tokenizer", "content"),
    [
        (TokenizerConfig("sentencepiece", clean="lower", pad_id=0), tiny_tokenizers.siglip_model),
        (TokenizerConfig("sentencepiece", clean="canonicalize", pad_id=1), tiny_tokenizers.siglip_model),
        (TokenizerConfig("xlm_roberta", clean="whitespace", pad_id=1), sentencepiece_model),
    ],
)
def test_directory_keeps_sentencepiece_models_with_their_padding_and_cleaning(tmp_path, tokenizer, content):
    architecture = tiny_models.ARCHITECTURES["siglip"]
    config = reading.WeightsConfig(architecture, tokenizer, tokenizer_file=content())
    write(tmp_path / "dir", tiny_models.params(architecture), config)
    found = reading.read(tmp_path / "dir").config
    assert found.tokenizer_file == content() and dataclasses.replace(found.tokenizer, path="") == tokenizer
