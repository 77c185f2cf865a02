"""Quality of the shuffling of training data, by arithmetic: `python benchmarks/shuffle.py docs/shuffling.svg`.

How often two records of one batch, or of two batches some steps apart, are of the same shard, relative to a permutation
of all records: for the block order (docs/training.md), and for shuffled shards with a buffer of 5,000 records in each
of 8 workers on 8 hosts, as in open_clip (a batch of a host is of one worker).
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from clip_jax.data.order import BlockOrder, RecordOrder
from clip_jax.evals.report.charts import line_chart

SHARDS, RECORDS, BLOCKS = 2000, 5000, 10  # records of a shard, blocks of a shard
BATCH, STEPS, LAGS = 4096, 400, range(0, 61, 4)
HOSTS, WORKERS, BUFFER, INITIAL = 8, 8, 5000, 1000
COLORS = "#6e6e73", "#3451d1", "#d9822b"
_VARIABLES = ";".join(f"--series-{number}:{color}" for number, color in enumerate(COLORS, 1))
HEAD = f'<svg xmlns="http://www.w3.org/2000/svg" style="{_VARIABLES};background:#fdfdfc;font:11px sans-serif" '


def ordered(order: BlockOrder | RecordOrder) -> np.ndarray:
    """Return the shard of each record, int64[STEPS BATCH]."""
    rows = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    return np.stack([order(positions)[1] // RECORDS for positions in rows])


def buffered(rng: np.random.Generator) -> np.ndarray:
    """Return the shard of each record with a shuffle buffer per worker, int64[STEPS BATCH]."""
    streams = np.array_split(rng.permutation(SHARDS), HOSTS * WORKERS)
    samples = [_buffered_stream(stream, rng) for stream in streams]
    size = BATCH // HOSTS
    batches = []
    for step in range(STEPS):
        workers = [samples[host * WORKERS + step % WORKERS] for host in range(HOSTS)]
        batches.append(np.concatenate([[next(worker) for _ in range(size)] for worker in workers]))
    return np.stack(batches)


def _buffered_stream(shards: np.ndarray, rng: np.random.Generator):
    """Yield shards of records as webdataset's shuffle does: two enter and one leaves until the buffer is full."""
    source = iter(np.repeat(shards, RECORDS).tolist())
    buffer: list[int] = []
    for shard in source:
        buffer.append(shard)
        if len(buffer) < BUFFER and (another := next(source, None)) is not None:
            buffer.append(another)
        if len(buffer) >= INITIAL:
            at = int(rng.integers(len(buffer)))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()
    yield from rng.permutation(buffer).tolist()


def same_shard(shards: np.ndarray, lag: int) -> float:
    """Return the frequency of pairs of the same shard between batches `lag` steps apart, relative to chance."""
    counts = np.stack([np.bincount(batch, minlength=SHARDS) for batch in shards])
    pairs = (counts[: len(counts) - lag] * counts[lag:]).sum(1).mean() - (BATCH if lag == 0 else 0)
    total = BATCH * (BATCH - 1 if lag == 0 else BATCH)
    return float(pairs / total * SHARDS)


def main() -> None:
    """Print the table and write the chart."""
    records = np.full(SHARDS * BLOCKS, RECORDS // BLOCKS)
    found = {
        "permutation of all records": ordered(RecordOrder(SHARDS * RECORDS, 0)),
        "block order, 64 lanes": ordered(BlockOrder(records, 0, BATCH, 64, 2 * RECORDS // BLOCKS)),
        "shuffle buffers of 64 workers": buffered(np.random.default_rng(0)),
    }
    series = {}
    for name, shards in found.items():
        series[name] = [(lag, same_shard(shards, lag)) for lag in LAGS]
        distinct = np.mean([len(np.unique(batch)) for batch in shards])
        values = ", ".join(f"{value:.2f}" for _, value in series[name][:6])
        print(
            f"{name:30}  {distinct:6.0f} shards in a batch of {BATCH:,}; pairs of one shard, lags 0, 4, 8 …: {values}"
        )
    if len(sys.argv) > 1:
        chart = line_chart(series, "Pairs of one shard, relative to chance, by distance in steps")
        pathlib.Path(sys.argv[1]).write_text(
            chart.replace("<svg ", HEAD, 1).replace("</svg>", f"{_legend(found)}</svg>")
        )


def _legend(names) -> str:
    rows = enumerate(names)
    return "".join(f'<text x="330" y="{24 + 16 * n}" style="fill:{COLORS[n]}">{name}</text>' for n, name in rows)


if __name__ == "__main__":
    main()
