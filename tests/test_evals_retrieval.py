"""Retrieval and ranks against sorted lists in float64."""

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from clip_jax.evals import ranking
from clip_jax.evals.embed import embed_dataset
from clip_jax.evals.intervals import bootstrap_interval
from clip_jax.evals.ranking import unit
from clip_jax.evals.retrieval import chance_recall, retrieval
from clip_jax.typing import EvalDataset

# Order of summation.
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Embeds images and texts, which are decimal row numbers, by looking up the row."""

    images: np.ndarray
    texts: np.ndarray

    def image(self, images):
        return self.images[[int(i) for i in images]]

    def text(self, texts):
        return self.texts[[int(t) for t in texts]]


def make_dataset(targets, text_count):
    return EvalDataset(
        "pairs",
        [str(i).encode() for i in range(len(targets))],
        [(str(i),) for i in range(text_count)],
        np.asarray(targets, np.int64),
    )


def ranks(queries, query_ids, candidates, candidate_ids):
    """Return the arrays of `Ranks`; candidates with the id of the query are positives."""
    positive = np.asarray(query_ids)[:, None] == np.asarray(candidate_ids)
    return np.stack(ranking.ranks(queries, candidates, np.nonzero(positive)))


def random_unit(seed, rows, width=16):
    return unit(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


def recall_by_sorting(queries, query_ids, candidates, candidate_ids, k):
    hits = []
    for query, query_id in zip(queries.astype(np.float64), query_ids, strict=True):
        order = sorted(range(len(candidates)), key=lambda j: -float(query @ candidates[j].astype(np.float64)))
        hits.append(any(candidate_ids[j] == query_id for j in order[:k]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_sorting_with_several_images_per_text(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 20, 70)  # 23 texts: some with several images, some with none
    images, texts = random_unit(seed, 70), random_unit(seed + 100, 23)
    metrics = retrieval(Lookup(images, texts), make_dataset(targets, 23))
    queries = np.unique(targets)
    for k in (1, 5, 10):
        to_text = recall_by_sorting(images, targets, texts, range(23), k)
        to_image = recall_by_sorting(texts[queries], queries, images, targets, k)
        assert metrics[f"retrieval/pairs/image_to_text/recall_at_{k}"] == pytest.approx(to_text, abs=ROUNDING)
        assert metrics[f"retrieval/pairs/text_to_image/recall_at_{k}"] == pytest.approx(to_image, abs=ROUNDING)


def test_several_captions_per_image_are_positives_and_are_resampled_together():
    rng = np.random.default_rng(0)
    caption_image = np.repeat(np.arange(12), 5)[rng.permutation(60)]  # the image of each caption
    texts, images = random_unit(1, 60), random_unit(2, 12)
    means = unit(np.stack([texts[caption_image == p].mean(0) for p in range(6)]))
    images[:6] = means  # the other six are similar to none of their captions
    several = dataclasses.replace(make_dataset(range(12), 60), targets=caption_image == np.arange(12)[:, None])
    metrics = retrieval(Lookup(images, texts), several)
    for k in (1, 5, 10):
        ways = ("image_to_text", "text_to_image")
        to_text, to_image = (metrics[f"retrieval/pairs/{way}/recall_at_{k}"] for way in ways)
        assert to_text == pytest.approx(recall_by_sorting(images, range(12), texts, caption_image, k), abs=ROUNDING)
        assert to_image == pytest.approx(recall_by_sorting(texts, caption_image, images, range(12), k), abs=ROUNDING)
    assert metrics["retrieval/pairs/image_to_text/recall_at_1/chance"] == pytest.approx(5 / 60)
    low, high = (metrics[f"retrieval/pairs/text_to_image/recall_at_1/{side}"] for side in ("ci_low", "ci_high"))
    by_caption = bootstrap_interval(ranks(texts, caption_image, images, np.arange(12))[0] < 1)
    assert low < metrics["retrieval/pairs/text_to_image/recall_at_1"] < high
    assert high - low > by_caption.high - by_caption.low  # twelve images, not sixty independent captions


def test_median_rank_counts_from_one():
    images = texts = np.eye(4, dtype=np.float32)
    assert retrieval(Lookup(images, texts), make_dataset(range(4), 4))["retrieval/pairs/image_to_text/median_rank"] == 1
    swapped = retrieval(Lookup(images[[1, 0, 3, 2]], texts), make_dataset(range(4), 4))
    # Orthogonal: one ahead, two tied; of four images with rank 2, 3 or 4 the median is rounded down.
    exact = np.mean([np.floor(np.median(r)) for r in itertools.product((2, 3, 4), repeat=4)])
    assert swapped["retrieval/pairs/image_to_text/median_rank"] == pytest.approx(exact, abs=0.1)
    assert swapped["retrieval/pairs/image_to_text/median_rank/by_index"] == 3


def test_block_sizes_do_not_change_the_ranks(monkeypatch):
    images, texts, targets = random_unit(0, 50), random_unit(1, 30), np.arange(50) % 30
    expected = ranks(images, targets, texts, np.arange(30))
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 7 * 30)
    np.testing.assert_array_equal(ranks(images, targets, texts, np.arange(30)), expected)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 1)
    np.testing.assert_array_equal(ranks(images, targets, texts, np.arange(30)), expected)


# Queries and candidates in a narrow cone, with duplicates: hundreds of pairs are within rounding of a tie.
def crowded(queries=300, candidates=200, width=64):
    rng = np.random.default_rng(5)
    center = rng.normal(size=width)
    x = center + 3e-3 * rng.normal(size=(queries + candidates, width))
    x[-20:] = x[queries : queries + 20]
    return unit(x[:queries]), unit(x[queries:]), np.arange(queries) % candidates


def ranks_by_float64(queries, candidates, positive):
    """Return the arrays of `Ranks` by a loop."""
    found = []
    for query, is_positive in zip(queries, positive, strict=True):
        cosines = np.array([float((query.astype(np.float64) * x.astype(np.float64)).sum()) for x in candidates])
        best = cosines[is_positive].max()
        ties = ~is_positive & (cosines == best)
        first = np.flatnonzero(is_positive & (cosines == best))[0]
        above = ~is_positive & (cosines > best)
        found.append([above.sum(), ties.sum(), ties[:first].sum(), (is_positive & (cosines == best)).sum()])
    return np.transpose(found)


def one_positive():
    queries, candidates, targets = crowded()
    return queries, candidates, targets, ranks_by_float64(queries, candidates, targets[:, None] == np.arange(200))


@pytest.mark.parametrize("scores", [2**22, 64**2, 33**2, 7**2])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_ranks_equal_float64_for_any_block_size_and_number_of_devices(monkeypatch, scores, devices):
    queries, candidates, targets, expected = one_positive()
    single = queries @ candidates.T
    by_float32 = (single > single[np.arange(300), targets][:, None]).sum(1)
    assert (by_float32 != expected[0]).any()  # float32 would give other ranks
    assert expected[1].any()  # with ties
    monkeypatch.setattr(ranking, "BLOCK_SCORES", scores)
    some = jax.local_devices()[:devices]
    monkeypatch.setattr(ranking.jax, "local_devices", lambda: some)
    np.testing.assert_array_equal(ranks(queries, targets, candidates, np.arange(200)), expected)


@pytest.mark.parametrize("seed", range(4))
def test_matmul_errors_below_the_bound_change_no_rank(monkeypatch, seed):
    """Random errors, as another chip's rounding could cause."""
    queries, candidates, targets, expected = one_positive()
    exact = ranking._cosines

    def with_errors(queries_bE, candidates_cE):
        scores_bc = exact(queries_bE, candidates_cE)
        error_bc = jax.random.uniform(jax.random.key(seed), scores_bc.shape, minval=-1, maxval=1)
        return scores_bc + 0.6 * ranking.UNCERTAINTY * error_bc

    monkeypatch.setattr(ranking, "_cosines", with_errors)
    monkeypatch.setattr(ranking, "_count", jax.jit(ranking._count.__wrapped__))
    found = ranks(queries, targets, candidates, np.arange(200))
    np.testing.assert_array_equal(found, expected)


def test_ranks_of_a_subset_of_queries_equal_those_among_all():
    queries, candidates, targets = crowded()
    expected = ranks(queries, targets, candidates, np.arange(200))
    subsets = [ranks(queries[rows], targets[rows], candidates, np.arange(200)) for rows in np.split(np.arange(300), 4)]
    np.testing.assert_array_equal(np.concatenate(subsets, 1), expected)


def test_the_best_of_several_positives_determines_the_rank():
    queries, candidates, _ = crowded()
    candidates[150:] = candidates[:50]  # positives that tie with each other and with negatives
    positive = np.random.default_rng(0).random((300, 200)) < 0.03
    some = positive.any(1)
    found = np.stack(ranking.ranks(queries, candidates, np.nonzero(positive)))
    np.testing.assert_array_equal(found[:, some], ranks_by_float64(queries[some], candidates, positive[some]))
    assert found[3].max() > 1 and found[2].max() > 0
    assert (found[0, ~some] == 200).all()


def test_a_duplicate_ties_in_any_block(monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 16**2)
    candidates = random_unit(0, 100)
    candidates[77] = candidates[3]
    above, tied, before, positives = ranks(candidates, np.arange(100), candidates, np.arange(100))
    assert not above.any() and (positives == 1).all()
    assert np.flatnonzero(tied).tolist() == [3, 77] and tied.max() == 1
    assert np.flatnonzero(before).tolist() == [77]


def test_memory_does_not_grow_with_the_number_of_pairs():
    """A million queries and candidates: the compiled program has one block of scores."""
    side = 2048
    row, index = jax.ShapeDtypeStruct((side,), np.float32), jax.ShapeDtypeStruct((side,), np.int32)
    x_bE, span = jax.ShapeDtypeStruct((side, 512), np.float32), jax.ShapeDtypeStruct((2,), np.int32)
    assert ranking._block_rows(10**6, math.isqrt(ranking.BLOCK_SCORES)) == side
    memory = ranking._count.lower(x_bE, row, row, index, x_bE, span).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * side**2


def test_datasets_of_similar_sizes_share_a_compilation():
    ranking._count.clear_cache()
    for rows, columns in ((700, 300), (900, 500), (901, 257)):
        queries, candidates = random_unit(0, rows), random_unit(1, columns)
        ranks(queries, np.arange(rows) % columns, candidates, np.arange(columns))
    assert ranking._count._cache_size() == 1


def test_blocks_are_not_larger_than_the_limit(monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 90)
    sizes = [scores.size for _, scores in ranking.score_blocks(random_unit(0, 50), random_unit(1, 30))]
    assert max(sizes) <= 90 and sum(sizes) == 50 * 30


def test_equal_embeddings_tie_at_any_position_in_a_matmul():
    row = random_unit(3, 1, width=509)  # not a multiple of BLAS's block sizes
    above, tied, before, _ = ranks(np.repeat(row, 67, 0), np.arange(67), np.repeat(row, 67, 0), np.arange(67))
    assert (tied == 66).all() and not above.any() and before.tolist() == list(range(67))
    cosines = ranking.scores(np.repeat(row, 67, 0), np.concatenate([random_unit(4, 5, 509), np.repeat(row, 9, 0)]))
    assert len(np.unique(cosines[:, 5:])) == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 0.0])
def test_a_zero_or_infinite_query_ties_with_all_and_changes_no_other(broken):
    images = texts = np.eye(6, dtype=np.float32)
    images = images.copy()
    images[2] = broken
    above, tied, before, _ = ranks(images, np.arange(6), texts, np.arange(6))
    assert above.tolist() == [0] * 6
    assert tied.tolist() == [0, 0, 5, 0, 0, 0] and before.tolist() == [0, 0, 2, 0, 0, 0]


def test_a_nan_negative_ranks_before_the_positive_and_a_nan_positive_last():
    texts = np.eye(6, dtype=np.float32)
    texts[5] = np.nan
    above, tied, *_ = ranks(np.eye(6, dtype=np.float32), np.arange(6), texts, np.arange(6))
    assert above.tolist() == [1, 1, 1, 1, 1, 5] and not tied.any()


def test_a_nan_positive_among_several_is_ignored():
    images = np.array([[np.nan, 0], [1, 0], [0, 1]], np.float32)
    found = ranks(np.eye(2, dtype=np.float32), np.array([0, 1]), images, np.array([0, 0, 1]))
    assert found[0].tolist() == [0, 1]


@pytest.mark.parametrize("candidates, positives, k", [(10, 1, 1), (10, 1, 5), (12, 3, 5), (12, 9, 5), (300, 40, 10)])
def test_chance_is_hypergeometric(candidates, positives, k):
    exact = 1 - Fraction(math.comb(candidates - positives, k), math.comb(candidates, k))
    assert chance_recall(candidates, np.array([positives]), k) == pytest.approx(float(exact), abs=ROUNDING)


@pytest.mark.slow
def test_random_embeddings_reach_chance():
    targets = np.repeat(np.arange(8), [1, 1, 2, 2, 3, 3, 4, 4])
    found = []
    for seed in range(300):
        embedder = Lookup(random_unit(seed, 20), random_unit(seed + 10_000, 8))
        metrics = retrieval(embedder, make_dataset(targets, 8))
        found.append([metrics[f"retrieval/pairs/{way}/recall_at_5"] for way in ("image_to_text", "text_to_image")])
    expected = [metrics[f"retrieval/pairs/{way}/recall_at_5/chance"] for way in ("image_to_text", "text_to_image")]
    # 300 means over 20 images or 8 texts: a standard error of 0.01 at most.
    np.testing.assert_allclose(np.mean(found, 0), expected, atol=0.04)


def test_k_above_the_number_of_candidates_is_skipped():
    metrics = retrieval(Lookup(random_unit(0, 12), random_unit(1, 4)), make_dataset(np.arange(12) % 4, 4))
    assert {k.rpartition("/")[2] for k in metrics if "image_to_text/recall" in k} == {
        "recall_at_1",
        "candidates",
        "chance",
        "ci_low",
        "ci_high",
    }
    assert "retrieval/pairs/text_to_image/recall_at_10" in metrics


def test_prompts_of_a_text_are_averaged_as_unit_vectors():
    texts = np.array([[9, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)  # the weight must not depend on the length
    images = np.array([[0.6, 0.8, 0], [0, 0, 1]], np.float32)
    pairs = EvalDataset("pairs", [b"0", b"1"], [("0", "1"), ("2",)], np.array([0, 1]))
    _, averaged = embed_dataset(Lookup(images, texts), pairs)
    np.testing.assert_allclose(averaged, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": []}, "0 images"),
        ({"texts": []}, "0 texts"),
        ({"targets": np.array([0])}, "got 1 for 2 images"),
        ({"targets": np.array([0, 2])}, "targets from 0 to 1"),
        ({"targets": np.array([-1, 0])}, "targets from 0 to 1"),
        ({"texts": [("0",), ()]}, "none for text 1"),
    ],
)
def test_inconsistent_datasets_are_refused(change, message):
    pairs = dataclasses.replace(make_dataset([0, 1], 2), **change)
    with pytest.raises(ValueError, match=message):
        retrieval(Lookup(random_unit(0, 2), random_unit(1, 2)), pairs)


def test_an_embedder_with_missing_rows_is_refused():
    class Losing(Lookup):
        def image(self, images):
            return super().image(images)[:-1]

    with pytest.raises(ValueError, match="expected 2 embeddings of images, got 1"):
        retrieval(Losing(random_unit(0, 2), random_unit(1, 2)), make_dataset([0, 1], 2))
