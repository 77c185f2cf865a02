"""Small tokenizers trained in the test: the content of a SentencePiece `.model` and of a `tokenizer.json`."""

import functools
import io

import sentencepiece

_NOUNS = ("dog", "wolf", "owl", "mouse", "bridge", "jacket", "zebra", "vixen", "quince", "harp", "church", "oven")
SENTENCES = [f"a {color} {noun} in the park" for color in ("red", "yellow", "blue") for noun in _NOUNS]


@functools.cache
def sentencepiece_model(**options) -> bytes:
    """Return a model of 32 pieces; by default without padding, start 1, end 2. `options` override trainer settings."""
    model = io.BytesIO()
    settings = {"vocab_size": 32, "minloglevel": 2, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES * 5), model_writer=model, **settings)
    return model.getvalue()


def siglip_model() -> bytes:
    """Return a model with the special pieces of SigLIP: <pad> 0, </s> 1, <unk> 2, no start."""
    return sentencepiece_model(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@functools.cache  # the trainer breaks ties at random
def tokenizer_json(template: str = "[CLS] $A [SEP]") -> bytes:
    """Return a WordPiece tokenizer as BERT's: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=152, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, number) for number, token in enumerate(special)]
        )
    return tokenizer.to_str().encode()
