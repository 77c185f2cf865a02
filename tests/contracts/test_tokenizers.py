"""Contract of every tokenizer in TOKENIZERS: the properties that text towers and the pipeline need."""

import concurrent.futures
import copy
import pickle

import numpy as np
import pytest

from clip_jax.config import TextTransformer, TokenizerConfig
from clip_jax.tokenizers import TOKENIZERS
from clip_jax.typing import Tokenizer
from tests.tiny_tokenizers import sentencepiece_model, tokenizer_json

LENGTH = 16
TEXTS = ["a dog", "", " ", "\0", "!", "犬", "😀", "dog " * 1000, "d" * 1000, "<|endoftext|>", "\n a \t b "]


# Content of the file that a tokenizer needs; the others need none.
FILES = {"sentencepiece": sentencepiece_model, "xlm_roberta": sentencepiece_model, "huggingface": tokenizer_json}


@pytest.fixture(scope="module", params=TOKENIZERS)
def make(request):
    file = FILES.get(request.param, lambda: b"")()
    config, text = TokenizerConfig(request.param), TextTransformer(context_length=LENGTH)
    return lambda truncate=True: TOKENIZERS[request.param](config, text, truncate, file)


def test_tokenizer_implements_the_protocol(make):
    assert isinstance(make(), Tokenizer)


def test_rows_are_int32_of_one_length_within_the_vocabulary(make):
    tokenizer = make()
    rows = tokenizer(TEXTS)
    assert rows.dtype == np.int32 and rows.shape == (len(TEXTS), LENGTH) == (len(TEXTS), tokenizer.length)
    assert rows.min() >= 0 and rows.max() < tokenizer.vocab_size


def test_rows_have_an_end_token_followed_by_padding(make):
    tokenizer = make()
    for text, row in zip(TEXTS, tokenizer(TEXTS), strict=True):
        ends = np.flatnonzero(row == tokenizer.eos_id)
        assert len(ends), text
        if "<|" not in text:
            assert (row[ends[0] + 1 :] == tokenizer.pad_id).all(), text


def test_ids_of_a_text_are_independent_of_the_other_texts(make):
    tokenizer = make()
    together = tokenizer(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(tokenizer([text])[0], together[i])


def test_two_instances_and_eight_threads_return_equal_ids(make):
    tokenizer = make()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: tokenizer([text])[0], TEXTS * 8))
    np.testing.assert_array_equal(np.stack(rows), make()(TEXTS * 8))


def test_overlong_text_is_truncated_or_raises(make):
    assert make()(["dog " * 1000])[0, -1] == make().eos_id
    with pytest.raises(ValueError, match=rf"model\.text\.context_length={LENGTH}"):
        make(truncate=False)(["dog " * 1000])


def test_single_string_raises(make):
    with pytest.raises(TypeError, match="sequence of texts"):
        make()("a dog")


def test_pickled_and_copied_tokenizers_return_equal_ids(make):
    tokenizer = make()
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        np.testing.assert_array_equal(other(TEXTS), tokenizer(TEXTS))
