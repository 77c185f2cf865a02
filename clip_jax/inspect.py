"""Statistics of training data, and a contact sheet of the model's input.

    clip-jax inspect '/data/cc3m/*.tfrecord' --sheet=sheet.png
    clip-jax inspect '/data/cc3m/*.tfrecord' --sample=100 --json
    clip-jax inspect --config=configs/vit_b32.py --config.data.files='/data/cc3m/*.tfrecord'

The argument is any value of `data.files`; without it those of --config. A sample of the records is read: sizes,
captions and their tokens, bad records with the reasons, records that `data.filters` of --config skips, rates. The sheet
shows augmented crops, and captions as tokenized and decoded again. Exit codes: 0; 2 for wrong arguments or unreadable
data, with a one-line error.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags
from ml_collections import config_flags

from clip_jax import command
from clip_jax import config as configs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A training config: its data, tokenizer, image size and augmentation; default: the paper's."
)
_SAMPLE = flags.DEFINE_integer("sample", 1000, "Number of records to read.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sample, the augmentation and the choice of captions.", lower_bound=0)
_SHEET = flags.DEFINE_string("sheet", "", "Write a contact sheet to this PNG file.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(arguments: list[str]) -> int:
    """Inspect and print. Returns the exit code."""
    from clip_jax import data  # TensorFlow
    from clip_jax.data.contact_sheet import contact_sheet
    from clip_jax.data.inspection import inspect, report
    from clip_jax.paths import check_output, write_atomically
    from clip_jax.tokenizers import make_tokenizer

    config = configs.Config() if _CONFIG.value is None else command.checked_config(_CONFIG.value)
    if len(arguments) > 1 or (arguments and config.data.files) or not (arguments or _CONFIG.value):
        raise ValueError("expected DATA, e.g. /data/cc3m or 'gs://bucket/cc3m/*.tar' in quotes, or --config with data")
    found = dataclasses.replace(config.data, files=arguments[0], source="") if arguments else config.data
    if _SHEET.value:
        check_output("--sheet", _SHEET.value, ("a file",))
    # Bad records are counted; those that a run would hold out are read, too.
    found = dataclasses.replace(data.recognize(found), max_bad_fraction=1.0, validation_fraction=0.0)
    source, text, size = data.make_source(found), config.model.text, config.model.image.image_size
    tokenizer = make_tokenizer(config.tokenizer, text)
    count_tokens = make_tokenizer(config.tokenizer, text, truncate=False).count
    sample, seed = _SAMPLE.value, _SEED.value
    inspected = inspect(source, tokenizer, count_tokens, found, image_size=size, sample=sample, seed=seed)
    description = data.describe(source, found)
    if _JSON.value:
        print(json.dumps({"data": description, **inspected.statistics}, ensure_ascii=False, indent=2))
    else:
        print(f"{description}\n{report(inspected.statistics)}")
    if _SHEET.value:
        if inspected.batch is None:
            raise ValueError(
                f"--sheet: expected a good record that passes data.filters in the sample of {sample}, got none"
            )
        texts = [tokenizer.decode(row) for row in inspected.batch.text]
        sheet = contact_sheet(inspected.batch.image, texts)
        write_atomically(_SHEET.value, lambda file: file.write(sheet))
    return command.FINISHED


if __name__ == "__main__":
    command.run(main, positional=True)
