"""Index training shards once for all hosts.

    clip-jax index 'gs://bucket/cc3m/{00000..00331}.tfrecord'
    clip-jax index '/data/cc3m/*.tfrecord'
    clip-jax index '/data/cc3m/*.tfrecord' --source=tfrecord

The argument is any value of `data.files`. The index is written to the folder of the shards, where every run finds it;
shards that are unchanged since an earlier index are not read again, so the command can be interrupted and repeated.
Exit codes: 0; 2 for wrong arguments or unreadable shards, with a one-line error.
"""

from __future__ import annotations

from absl import flags

from clip_jax import command

_SOURCE = flags.DEFINE_string("source", "", "Format, tfrecord or tar; '' for that of the files' names.")
_BEAM = flags.DEFINE_list("beam_options", [], "Index with Apache Beam, e.g. --runner=DataflowRunner.")


def main(arguments: list[str]) -> int:
    """Index and print a summary. Returns the exit code."""
    from clip_jax.data import index_files  # TensorFlow

    if len(arguments) != 1:
        raise ValueError(f"expected DATA, e.g. 'gs://bucket/cc3m/*.tar' in quotes, got {len(arguments)} arguments")
    print(index_files(arguments[0], _SOURCE.value, _BEAM.value))
    return command.FINISHED


if __name__ == "__main__":
    command.run(main, positional=True)
