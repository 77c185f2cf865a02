"""Tokenizers: token ids equal to OpenAI's, padding, truncation, and agreement with the text tower."""

import concurrent.futures
import gzip
import hashlib
import html
import json
import pathlib
import random
import time

import ftfy
import numpy as np
import pytest
import tokenizers

from clip_jax.config import TextTransformer, TokenizerConfig
from clip_jax.tokenizers import ClipBPE, HuggingFace, SentencePiece, cleaning, make_tokenizer
from clip_jax.tokenizers import bpe as bpe_module
from clip_jax.tokenizers.bpe import MAX_VOCAB_SIZE
from clip_jax.tokenizers.cleaning import CLEAN, clean
from tests.tiny_tokenizers import sentencepiece_model, siglip_model, tokenizer_json

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden/clip_bpe.json").read_text())["rows"]
START, END = 49_406, 49_407
# Measured: one second on a slow core; OpenAI's algorithm, which rescans the word for every merge, takes a minute.
LONG_WORD_SECONDS = 10.0


@pytest.fixture(scope="module")
def bpe():
    return ClipBPE()


# ------------------------------------------------------------------------------------------------------ clip_bpe


@pytest.mark.parametrize("group", sorted({row["group"] for row in GOLDEN}))
def test_against_openai(bpe, group):
    """Ids recorded from OpenAI's code by golden/make_clip_bpe.py."""
    for row in (row for row in GOLDEN if row["group"] == group):
        ids = bpe.encode(row["text"] * row["times"])
        assert len(ids) == row["count"], row["text"]
        if "ids" in row:
            assert ids == row["ids"], row["text"]
        else:
            assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == row["sha256"], row["text"]


def test_row_is_start_tokens_end_zeros(bpe):
    rows = bpe(["a happy dog", ""])
    assert rows.dtype == np.int32 and rows.shape == (2, 77)
    assert rows[0, :5].tolist() == [START, 320, 900, 1929, END] and not rows[0, 5:].any()
    assert rows[1, :2].tolist() == [START, END] and not rows[1, 2:].any()
    assert (bpe.vocab_size, bpe.length, bpe.pad_id, bpe.eos_id) == (MAX_VOCAB_SIZE, 77, 0, END)


def test_no_texts_give_no_rows(bpe):
    assert bpe([]).shape == (0, 77)


def test_truncation_keeps_the_end_token_and_the_first_tokens():
    rows = ClipBPE(length=6)(["a happy dog", "a happy dog dog", "a happy dog dog dog"])
    assert rows.tolist() == [
        [START, 320, 900, 1929, END, 0],
        [START, 320, 900, 1929, 1929, END],  # fits exactly
        [START, 320, 900, 1929, 1929, END],  # one too many
    ]


def test_overlong_text_raises_with_its_beginning_its_length_and_the_key():
    with pytest.raises(
        ValueError, match=r"'dog dog .*: expected at most model\.text\.context_length=77 .*, got 102; .*truncate"
    ):
        ClipBPE(truncate=False)(["dog " * 100])
    assert ClipBPE(truncate=False)(["dog " * 75])[0, -1] == END


def test_single_string_raises(bpe):
    with pytest.raises(TypeError, match="wrap it"):
        bpe("dog")


def test_decode_returns_lower_case_words_separated_by_spaces(bpe):
    assert bpe.decode(bpe(["A Dog's  12 ©😀!!"])[0]) == "a dog 's 1 2 ©😀!!"


@pytest.mark.parametrize("vocab_size", [515, 600, 4096, MAX_VOCAB_SIZE])
def test_small_vocabulary_encodes_any_text(vocab_size):
    tokenizer = ClipBPE(length=400, vocab_size=vocab_size, truncate=False)
    texts = ["a photo of a dog", "犬 と 猫", "😀 naïve \x07 ½"]
    rows = tokenizer(texts)
    assert rows.max() == vocab_size - 1 == tokenizer.eos_id
    assert [tokenizer.decode(row) for row in rows] == ["a photo of a dog", "犬 と 猫", "😀 naïve ½"]


def test_small_vocabulary_uses_the_first_merges():
    small, large = ClipBPE(vocab_size=4096), ClipBPE()
    texts = [row["text"] for row in GOLDEN if row["group"] == "plain"]
    for text in texts:
        if max(large.encode(text), default=0) < 4094:
            assert small.encode(text) == large.encode(text)
        else:
            assert len(small.encode(text)) > len(large.encode(text))


@pytest.mark.parametrize("vocab_size", [0, 514, MAX_VOCAB_SIZE + 1])
def test_vocabulary_out_of_range_raises(vocab_size):
    with pytest.raises(ValueError, match=rf"model\.text\.vocab_size: expected 515 to 49408 .*, got {vocab_size};"):
        ClipBPE(vocab_size=vocab_size)


def test_length_without_room_for_a_token_raises():
    with pytest.raises(ValueError, match=r"model\.text\.context_length: expected at least 3, got 2"):
        ClipBPE(length=2)


def test_long_words_do_not_take_quadratic_time(bpe):
    word = "".join(random.Random(0).choices("abcdefghij", k=50_000))
    began = time.monotonic()
    bpe([word])
    assert time.monotonic() - began < LONG_WORD_SECONDS


def test_shortcut_for_complete_words_equals_merging(bpe):
    """Checked for every word of CLIP's table."""
    words = bpe_module._read_table("").words
    assert len(words) > 30_000 and {"dog", "a", "the"} <= words.keys()
    for word, number in words.items():
        assert list(bpe._encode_word(word)) == [number], word


def test_both_merge_algorithms_give_the_same_ids(bpe):
    rng = random.Random(0)
    for length in range(1, 130):
        ids = [256 * (place == length - 1) + rng.choice([0, *range(64, 90)]) for place in range(length)]
        assert bpe_module._merge(list(ids), bpe._merges) == list(bpe_module._merge_long(list(ids), bpe._merges))


def test_texts_that_skip_repair_need_none():
    """Checked for every Unicode character, alone and next to letters, and for random texts of unrepaired characters."""
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    unrepaired = [letter for letter in letters if cleaning._UNTOUCHED.fullmatch(letter)]
    assert len(unrepaired) > 30_000
    texts = ["".join(unrepaired[at : at + 16]) for at in range(0, len(unrepaired), 16)]
    rng = random.Random(0)
    few = [letter for letter in unrepaired if letter < "\u0500" or "\u2000" < letter < "\u2600"]
    texts += ["".join(rng.choices(few, k=rng.randint(2, 6))) for _ in range(20_000)]
    texts += [f"a{letter}b {letter}" for letter in few]
    for text in texts:
        assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower(), text


def test_threads_return_the_ids_of_one_thread(bpe):
    texts = [row["text"] for row in GOLDEN if row["times"] == 1] * 4
    fresh = ClipBPE()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: fresh([text])[0], texts))
    np.testing.assert_array_equal(np.stack(rows), bpe(texts))


def test_word_cache_is_bounded_and_excludes_long_words():
    tokenizer = ClipBPE()
    tokenizer(["x" * 65, "y" * 64])
    assert tokenizer._recent.cache_info().currsize == 1
    assert tokenizer._recent.cache_info().maxsize == 65_536


def test_custom_merge_table_is_read_plain_gzipped_and_with_header(tmp_path):
    table = "t h\nth e</w>\na n\n"
    variants = {"plain.txt": table, "header.txt": "#version: 0.2\n" + table}
    for name, text in variants.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(table.encode()))
    for name in (*variants, "zipped.gz"):
        tokenizer = ClipBPE(vocab_size=517, merges_path=str(tmp_path / name))
        assert tokenizer.encode("the") == [513] and tokenizer.encode("ththe") == [512, 513]
    assert ClipBPE(vocab_size=517, merges_path=table.encode()).encode("the") == [513]


@pytest.mark.parametrize("line", ["th", "a b c", "ab c", "t h", "犬 b"])
def test_line_that_is_no_merge_raises_with_its_number(line, tmp_path):
    (tmp_path / "merges.txt").write_text(f"t h\n{line}\n")
    with pytest.raises(ValueError, match="line 2: expected two symbols, .*, got "):
        ClipBPE(vocab_size=515, merges_path=str(tmp_path / "merges.txt"))


def test_missing_merge_table_raises_with_its_path():
    with pytest.raises(ValueError, match=r"tokenizer\.path='/nowhere/merges\.txt'"):
        ClipBPE(merges_path="/nowhere/merges.txt")


# ------------------------------------------------------------------------------------------------- sentencepiece


def test_sentencepiece_rows_are_pieces_end_padding():
    tokenizer = SentencePiece(sentencepiece_model(pad_id=3), length=24)
    row = tokenizer(["a red dog"])[0]
    assert row[0] != 1 and tokenizer.eos_id in row and row[-1] == tokenizer.pad_id == 3
    assert tokenizer.decode(row) == "a red dog" and tokenizer.vocab_size == 32


def test_sentencepiece_without_start_and_padding_pads_with_the_end_token():
    tokenizer = SentencePiece(sentencepiece_model(bos_id=-1, eos_id=1, unk_id=2), length=24)
    row = tokenizer(["a red dog"])[0]
    assert row[0] != 1 and row[-1] == tokenizer.pad_id == tokenizer.eos_id == 1
    assert tokenizer.decode(row) == "a red dog"


def test_sentencepiece_model_is_parsed_once(monkeypatch):
    import sentencepiece

    parsed, load = [], sentencepiece.SentencePieceProcessor.LoadFromSerializedProto
    monkeypatch.setattr(
        sentencepiece.SentencePieceProcessor,
        "LoadFromSerializedProto",
        lambda self, content: parsed.append(len(content)) or load(self, content),
    )
    text = TextTransformer(32, 16, 2, width=32, heads=1, layers=1)
    make_tokenizer(TokenizerConfig("sentencepiece"), text, tokenizer_file=sentencepiece_model())
    assert len(parsed) == 1


def test_sentencepiece_may_have_end_token_0():
    assert SentencePiece(sentencepiece_model(eos_id=0, unk_id=2), length=24)(["a red dog"])[0, -1] == 0


def test_sentencepiece_truncates_before_the_end_token_or_raises():
    model = sentencepiece_model()
    row = SentencePiece(model, length=5)(["a red dog in the park"])[0]
    assert row[-1] == SentencePiece(model, length=5).eos_id
    np.testing.assert_array_equal(row[:-1], SentencePiece(model, length=40)(["a red dog in the park"])[0, :4])
    with pytest.raises(ValueError, match=r"'a red dog in the park'.*model\.text\.context_length=5"):
        SentencePiece(model, length=5, truncate=False)(["a red dog in the park"])


def test_sentencepiece_errors_name_the_file_and_the_problem(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.path='/nowhere\.model'.*--config\.tokenizer\.path="):
        SentencePiece("/nowhere.model", length=24)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model.*: expected a SentencePiece model, got "):
        SentencePiece(tmp_path / "bad.model", length=24)
    with pytest.raises(ValueError, match="expected an end token.*--eos_id=1"):
        SentencePiece(sentencepiece_model(eos_id=-1), length=24)


# --------------------------------------------------------------------------------------------------- huggingface


def test_huggingface_rows_are_the_file_s_tokens_and_padding():
    tokenizer = HuggingFace(tokenizer_json(), length=12)
    row = tokenizer(["A red dog"])[0]
    assert (row[0], tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 0)
    end = row.tolist().index(3)
    assert not row[end + 1 :].any() and row[1:end].all() and tokenizer.decode(row) == "a red dog"
    assert tokenizer.token(3) == "[SEP]" and tokenizer.vocab_size <= 152


def test_huggingface_files_with_padding_and_truncation_use_the_given_length():
    texts = ["a red dog in the park", "a"]
    file = tokenizers.Tokenizer.from_buffer(tokenizer_json())
    file.enable_padding(pad_id=3, pad_token="[SEP]")
    file.enable_truncation(5)
    plain, padding = HuggingFace(tokenizer_json(), 12), HuggingFace(file.to_str().encode(), 12)
    assert padding.pad_id == 3
    np.testing.assert_array_equal(np.where(plain(texts) == 0, 3, plain(texts)), padding(texts))


def test_huggingface_truncates_before_the_end_token_or_raises():
    text = "a red dog in the park"
    whole, row = HuggingFace(tokenizer_json(), 40)([text])[0], HuggingFace(tokenizer_json(), 5)([text])[0]
    assert row.tolist() == [*whole[:4], 3]
    with pytest.raises(ValueError, match=r"'a red dog in the park'.*model\.text\.context_length=5"):
        HuggingFace(tokenizer_json(), 5, truncate=False)([text])


def test_huggingface_errors_name_the_file_and_the_problem(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.path='/nowhere\.json'.*--config\.tokenizer\.path="):
        HuggingFace("/nowhere.json", length=24)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json.*: expected a tokenizer\.json, got "):
        HuggingFace(tmp_path / "bad.json", length=24)
    with pytest.raises(ValueError, match="expected an end token"):
        HuggingFace(tokenizer_json(template=""), length=24)


@pytest.mark.parametrize(("make", "file"), [(SentencePiece, siglip_model), (HuggingFace, tokenizer_json)])
def test_pad_id_and_keep_end_override_the_file(make, file):
    default, other = make(file(), 12)(["a red dog"])[0], make(file(), 12, pad_id=7)(["a red dog"])[0]
    end = default.tolist().index(make(file(), 12).eos_id)
    assert not default[end + 1 :].any() and (other[end + 1 :] == 7).all()
    np.testing.assert_array_equal(default[: end + 1], other[: end + 1])
    without = make(file(), 12, pad_id=0, keep_end=False)(["a red dog"])[0]
    np.testing.assert_array_equal(without, [*default[:end], *[0] * (12 - end)])


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("none", " A_b,\n&amp;", " A_b,\n&amp;"),
        ("lower", " A_b,\n&amp;", " a_b,\n&amp;"),
        ("whitespace", " A_b,\n&amp; caf\u00c3\u00a9", "A_b, & caf\u00e9"),
        ("canonicalize", " A_b,\n&amp; It's 3.5", "a b its 35"),
    ],
)
def test_clean_functions(how, text, expected):
    assert CLEAN[how](text) == expected


@pytest.mark.parametrize(("make", "file"), [(SentencePiece, siglip_model), (HuggingFace, tokenizer_json)])
def test_cleaned_text_is_tokenized(make, file):
    plain, cleaned = make(file(), 12), make(file(), 12, clean="canonicalize")
    np.testing.assert_array_equal(cleaned(["A_RED, dog!"]), plain(["a red dog"]))
    assert (plain(["A_RED, dog!"]) != plain(["a red dog"])).any()


# -------------------------------------------------------------------------------------------------- make_tokenizer


def test_make_tokenizer_follows_the_text_tower():
    tokenizer = make_tokenizer(TokenizerConfig(), TextTransformer(vocab_size=4096, context_length=24, eos_id=4095))
    assert (tokenizer.vocab_size, tokenizer.length, tokenizer.eos_id) == (4096, 24, 4095)


def test_tower_with_another_end_token_raises():
    with pytest.raises(ValueError, match=r"eos_id: expected 4095 by .*, got 49407; set model\.text\.eos_id=4095"):
        make_tokenizer(TokenizerConfig(), TextTransformer(vocab_size=4096))


def test_vocabulary_that_does_not_fit_raises_with_both_sizes(tmp_path):
    path = tmp_path / "park.model"
    path.write_bytes(sentencepiece_model())
    config = TokenizerConfig("sentencepiece", str(path))
    with pytest.raises(ValueError, match=r"expected 32 by .*, got 49408; set model\.text\.vocab_size=32"):
        make_tokenizer(config, TextTransformer())
    assert make_tokenizer(config, TextTransformer(vocab_size=32, eos_id=2)).vocab_size == 32


def test_tower_may_have_a_few_more_rows_than_tokens():
    config, text = TokenizerConfig("huggingface"), TextTransformer(eos_id=3)
    size = HuggingFace(tokenizer_json(), 12).vocab_size
    for more, fits in {0: True, 4: True, -1: False, size: False}.items():
        tower = TextTransformer(vocab_size=size + more, eos_id=text.eos_id)
        if fits:
            assert make_tokenizer(config, tower, tokenizer_file=tokenizer_json()).vocab_size == size
        else:
            with pytest.raises(ValueError, match=rf"set model\.text\.vocab_size={size}"):
                make_tokenizer(config, tower, tokenizer_file=tokenizer_json())


@pytest.mark.parametrize("setting", [{"clean": "lower"}, {"pad_id": 3}, {"keep_end": False}])
def test_settings_that_clip_bpe_does_not_have_raise(setting):
    with pytest.raises(ValueError, match=rf"tokenizer\.{next(iter(setting))}: expected .* with clip_bpe, got"):
        make_tokenizer(TokenizerConfig(**setting), TextTransformer())


def test_tokenizer_file_stored_with_the_weights_needs_no_path():
    config = TokenizerConfig("sentencepiece", "/gone.model")
    tokenizer = make_tokenizer(config, TextTransformer(vocab_size=32, eos_id=2), tokenizer_file=sentencepiece_model())
    assert tokenizer.vocab_size == 32
