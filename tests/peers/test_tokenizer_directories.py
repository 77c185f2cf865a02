"""Random tokenizer directories: the ids of transformers' AutoTokenizer, or a refusal with the file and the key."""

import json
import random

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clip_jax.config import Architecture, TextTransformer, ViT
from clip_jax.interop import tokenizer_files
from clip_jax.tokenizers import ClipBPE, make_tokenizer
from tests import tiny_tokenizers

TEXTS = [
    *tiny_tokenizers.SENTENCES[:4],
    "A RED_dog, in: the Park!",
    "",
    "  two  spaces\tand a tab ",
    " ".join(tiny_tokenizers.SENTENCES[:6]),
    "犬 zq ÄÖ é ﬁ İ Σας",
    "Zebra zebra!! ?",
    "don't '10' 3.5",
]
# For SentencePiece models, special tokens in a text are ordinary characters (docs/pretrained_weights.md).
SPECIAL_TEXTS = ["<s> dog </s> [SEP] <eos> new_token <pad> zebra", "dog<|endoftext|>dog <mask>"]
SEEDS = range(100)
TRAINERS = {"BPE": trainers.BpeTrainer, "WordLevel": trainers.WordLevelTrainer, "WordPiece": trainers.WordPieceTrainer}
IMAGE = ViT(32, 16, 64, 1, 1)


def _of_words(rng):
    """Return a generic tokenizer of a random kind, with its special tokens."""
    marks = rng.choice([["<s>", "</s>", "<pad>", "<unk>"], ["[CLS]", "[SEP]", "[PAD]", "[UNK]"]])
    kind = rng.choice(["WordLevel", "BPE", "Unigram", "WordPiece"])
    settings = {"special_tokens": marks, "show_progress": False}
    if kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**settings, unk_token=marks[3])
    else:
        tokenizer = Tokenizer(getattr(models, kind)(unk_token=marks[3]))
        trainer = TRAINERS[kind](vocab_size=150, **settings)
    lower = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    normalizer = rng.choice([None, normalizers.Lowercase(), normalizers.NFKC(), lower])
    if normalizer:
        tokenizer.normalizer = normalizer
    before = [pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = rng.choice([*before, pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.5)])
    tokenizer.train_from_iterator(tiny_tokenizers.SENTENCES * 3, trainer)
    template = rng.choice([f"{marks[0]} $A {marks[1]}", f"$A {marks[1]}"])
    ids = [(token, tokenizer.token_to_id(token)) for token in marks[:2]]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    if rng.random() < 0.3:
        tokenizer.enable_padding(direction=rng.choice(["left", "right"]), pad_id=2, pad_token=marks[2])
    if rng.random() < 0.3:
        tokenizer.enable_truncation(9, direction=rng.choice(["left", "right"]))
    return tokenizer, marks


def _generic(rng, folder):
    tokenizer, marks = _of_words(rng)
    names = ["bos_token", "eos_token", "pad_token", "unk_token"]
    special = dict(zip(names, marks, strict=True))
    if rng.random() < 0.2:
        special["pad_token"] = rng.choice([marks[1], "dog", "<new pad>"])
    if rng.random() < 0.3:
        special["mask_token"] = AddedToken("<mask>", lstrip=True)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **_settings(rng))
    if rng.random() < 0.4:
        saved.add_tokens(["new_token", AddedToken("zebra", lstrip=True, single_word=True)])
    saved.save_pretrained(folder)


def _settings(rng):
    found = {"model_max_length": rng.choice([12, 64, 1000] * 3 + [8])}
    for key, values in {
        "padding_side": ["left", "right"],
        "truncation_side": ["left", "right"],
        "do_lower_case": [True, False],
        "add_prefix_space": [True, False],
        "clean_up_tokenization_spaces": [True, False],
        "extra_special_tokens": [["dog"], ["<extra>"]],
    }.items():
        if rng.random() < 0.15:
            found[key] = rng.choice(values)
    return found


def _own_merges(rng, folder):
    """CLIP's class with a prefix of its merges, some of them exchanged."""
    vocabulary, merges = ClipBPE(vocab_size=700).as_huggingface()
    if rng.random() < 0.5:
        merges[3], merges[4] = merges[4], merges[3]
    if rng.random() < 0.3:
        numbers = list(vocabulary.values())[:-2]
        rng.shuffle(numbers)
        vocabulary = dict(zip(list(vocabulary)[:-2], numbers, strict=True)) | dict(list(vocabulary.items())[-2:])
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = rng.choice(["<|endoftext|>", "!"])
    if rng.random() < 0.5:
        pairs = [tuple(merge.split()) for merge in merges]
        transformers.CLIPTokenizer(vocabulary, pairs, **special, **_settings(rng)).save_pretrained(folder)
        return
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    content = {"tokenizer_class": "CLIPTokenizer"} | special | _settings(rng)
    if rng.random() < 0.3:
        (folder / "added_tokens.json").write_text(json.dumps({"new_token": 700}))
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _siglip(rng, folder):
    folder.mkdir()
    (folder / "spiece.model").write_bytes(tiny_tokenizers.siglip_model())
    content = {"tokenizer_class": "SiglipTokenizer", "pad_token": rng.choice(["</s>", "<pad>"])} | _settings(rng)
    content |= rng.choice([{}, {"do_lower_case": False}, {"do_lower_case": True}])
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _xlm_roberta(rng, folder):
    folder.mkdir()
    (folder / "sentencepiece.bpe.model").write_bytes(tiny_tokenizers.sentencepiece_model())
    content = {"tokenizer_class": "XLMRobertaTokenizer"} | _settings(rng)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if rng.random() < 0.5:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        (folder / "sentencepiece.bpe.model").unlink()
        tokenizer.save_pretrained(folder)


def _of_class(rng, folder):
    """A class that replaces the parts of tokenizer.json, with a vocabulary of its kind."""
    name = rng.choice(["GemmaTokenizer", "Siglip2Tokenizer", "T5Tokenizer", "BertTokenizer"])
    special = {"GemmaTokenizer": "<pad> <eos> <bos> <unk> <mask>", "T5Tokenizer": "<pad> </s> <unk>"}
    special = special.get(name, special["GemmaTokenizer"] if "2" in name else "[PAD] [UNK] [CLS] [SEP] [MASK]").split()
    kind = {"T5Tokenizer": "Unigram", "BertTokenizer": "WordPiece"}.get(name, "BPE")
    unk = next(token for token in special if "unk" in token.lower())
    if kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
    else:
        tokenizer, trainer = Tokenizer(getattr(models, kind)(unk_token=unk)), TRAINERS[kind]
    options = {"unk_token": unk} if kind == "Unigram" else {}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if kind != "WordPiece" else pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = rng.choice([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.train_from_iterator(
        tiny_tokenizers.SENTENCES * 3,
        trainer(vocab_size=150, special_tokens=special, show_progress=False, **options),
    )
    end = next(token for token in special if token in ("<eos>", "</s>", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.decoder = decoders.Metaspace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": name} | _settings(rng) | rng.choice([{}, {"extra_ids": 0}])
    content |= rng.choice([{}, {"tokenize_chinese_chars": False, "strip_accents": False}])
    if name == "GemmaTokenizer":
        content.pop("do_lower_case", None)  # obeyed here, ignored by transformers
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


KINDS = [_generic, _generic, _own_merges, _siglip, _xlm_roberta, _of_class]


def _mutate(rng, folder):
    """Turn a directory of transformers 5 into an older layout, or remove or exchange a key."""
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    if rng.random() < 0.3:
        keys = [key for key in content if key.endswith("_token")]
        special = {key: {"content": content.pop(key), "lstrip": False, "rstrip": False} for key in keys}
        special = {key: value | {"normalized": False, "single_word": False} for key, value in special.items()}
        if all(isinstance(value["content"], str) for value in special.values()):
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
        else:
            content = json.loads(file.read_text())
    if rng.random() < 0.2:
        token = {"content": "zebra", "lstrip": False, "rstrip": True, "single_word": False, "normalized": True}
        content["added_tokens_decoder"] = {"150": token | {"special": False}}
    if rng.random() < 0.05:
        content["split_special_tokens"] = True
    file.write_text(json.dumps(content))


def _directory(seed, folder):
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    kind(rng, folder)
    if rng.random() < 0.5:
        _mutate(rng, folder)
    return rng


def _model(tokenizer, rng, length=12):
    pool = rng.choice(["end", "last"])
    eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else len(tokenizer) - 1
    text = TextTransformer(len(tokenizer), length, eos_id, 64, 1, 1, pool=pool, causal=pool == "end")
    return Architecture(IMAGE, text, 32, logit_bias=pool == "last")


def _compare(seed, folder):
    """Return 'equal', or the reason of a refusal; an id that differs fails."""
    rng = _directory(seed, folder)
    texts = TEXTS + ([] if list(folder.glob("*.model")) else SPECIAL_TEXTS)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    if peer.pad_token is None:
        return "transformers does not pad without a pad_token"
    model = _model(peer, rng)
    settings = {"padding": "max_length", "truncation": True, "max_length": model.text.context_length}
    expected = peer(texts, **settings)["input_ids"]
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip" if model.logit_bias else "clip"}))
    try:
        config, content = tokenizer_files.read(folder, model)
        tokenizer = make_tokenizer(config, model.text, tokenizer_file=content)
    except ValueError as error:
        return str(error)
    files = sorted(path.name for path in folder.iterdir())
    for text, found, ids in zip(texts, tokenizer(texts).tolist(), expected, strict=True):
        assert found == ids, (seed, type(peer).__name__, files, config, text, found, ids)
    return "equal"


def test_random_directories_have_the_ids_of_transformers_or_are_refused(tmp_path):
    found = [_compare(seed, tmp_path / str(seed)) for seed in SEEDS]
    refused = [reason for reason in found if reason != "equal"]
    assert found.count("equal") >= 60, refused
