"""Retrieval and its ranks, against sorted lists in float64."""

import dataclasses
import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from clip_jax.evals import ranking
from clip_jax.evals.embed import embed_set
from clip_jax.evals.metrics import bootstrap_interval
from clip_jax.evals.ranking import unit
from clip_jax.evals.retrieval import chance_of_recall, retrieval
from clip_jax.typing import EvalDataset

# Sums of the same few fractions in another order.
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Given:
    """An embedder that looks vectors up: pictures and texts are decimal numbers of rows."""

    images: np.ndarray
    texts: np.ndarray

    def image(self, images):
        return self.images[[int(i) for i in images]]

    def text(self, texts):
        return self.texts[[int(t) for t in texts]]


def eval_set(targets, text_count):
    return EvalDataset(
        "pairs",
        [str(i).encode() for i in range(len(targets))],
        [(str(i),) for i in range(text_count)],
        np.asarray(targets, np.int64),
    )


def ranks(queries, query_ids, candidates, candidate_ids):
    """Return the ranks where a candidate is right if its id is the query's."""
    right = np.asarray(query_ids)[:, None] == np.asarray(candidate_ids)
    return ranking.ranks(queries, candidates, np.nonzero(right))


def random_unit(seed, rows, width=16):
    return unit(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


def recall_by_sorting(queries, query_ids, candidates, candidate_ids, k):
    hits = []
    for query, query_id in zip(queries.astype(np.float64), query_ids, strict=True):
        order = sorted(range(len(candidates)), key=lambda j: -float(query @ candidates[j].astype(np.float64)))
        hits.append(any(candidate_ids[j] == query_id for j in order[:k]))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_those_of_sorted_lists_with_several_pictures_to_a_text(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 20, 70)  # 23 texts: some with several pictures, some with none
    images, texts = random_unit(seed, 70), random_unit(seed + 100, 23)
    metrics = retrieval(Given(images, texts), eval_set(targets, 23))
    asked = np.unique(targets)
    for k in (1, 5, 10):
        to_text = recall_by_sorting(images, targets, texts, range(23), k)
        to_image = recall_by_sorting(texts[asked], asked, images, targets, k)
        assert metrics[f"retrieval/pairs/image_to_text/recall_at_{k}"] == pytest.approx(to_text, abs=ROUNDING)
        assert metrics[f"retrieval/pairs/text_to_image/recall_at_{k}"] == pytest.approx(to_image, abs=ROUNDING)


def test_several_captions_to_a_picture_are_all_right_and_pictures_are_drawn_with_their_captions():
    rng = np.random.default_rng(0)
    picture = np.repeat(np.arange(12), 5)[rng.permutation(60)]  # of each caption
    texts, images = random_unit(1, 60), random_unit(2, 12)
    known = unit(np.stack([texts[picture == p].mean(0) for p in range(6)]))
    images[:6] = known  # the other six are known by none of their captions
    several = dataclasses.replace(eval_set(range(12), 60), targets=picture == np.arange(12)[:, None])
    metrics = retrieval(Given(images, texts), several)
    for k in (1, 5, 10):
        ways = ("image_to_text", "text_to_image")
        to_text, to_image = (metrics[f"retrieval/pairs/{way}/recall_at_{k}"] for way in ways)
        assert to_text == pytest.approx(recall_by_sorting(images, range(12), texts, picture, k), abs=ROUNDING)
        assert to_image == pytest.approx(recall_by_sorting(texts, picture, images, range(12), k), abs=ROUNDING)
    assert metrics["retrieval/pairs/image_to_text/recall_at_1/chance"] == pytest.approx(5 / 60)
    low, high = (metrics[f"retrieval/pairs/text_to_image/recall_at_1/{side}"] for side in ("ci_low", "ci_high"))
    by_caption = bootstrap_interval(ranks(texts, picture, images, np.arange(12)) < 1)
    assert low < metrics["retrieval/pairs/text_to_image/recall_at_1"] < high
    assert high - low > by_caption.high - by_caption.low  # twelve pictures say less than sixty captions seem to


def test_median_rank_counts_from_one():
    images = texts = np.eye(4, dtype=np.float32)
    assert retrieval(Given(images, texts), eval_set(range(4), 4))["retrieval/pairs/image_to_text/median_rank"] == 1
    swapped = retrieval(Given(images[[1, 0, 3, 2]], texts), eval_set(range(4), 4))
    assert swapped["retrieval/pairs/image_to_text/median_rank"] == 4  # orthogonal: one ahead, two tied


def test_blocks_do_not_change_the_ranks(monkeypatch):
    images, texts, targets = random_unit(0, 50), random_unit(1, 30), np.arange(50) % 30
    whole = ranks(images, targets, texts, np.arange(30))
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 7 * 30)
    np.testing.assert_array_equal(ranks(images, targets, texts, np.arange(30)), whole)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 1)
    np.testing.assert_array_equal(ranks(images, targets, texts, np.arange(30)), whole)


# Queries and candidates in a narrow cone, some of them twice: hundreds of pairs lie within rounding of a tie.
def crowded(queries=300, candidates=200, width=64):
    rng = np.random.default_rng(5)
    centre = rng.normal(size=width)
    x = centre + 3e-3 * rng.normal(size=(queries + candidates, width))
    x[-20:] = x[queries : queries + 20]
    return unit(x[:queries]), unit(x[queries:]), np.arange(queries) % candidates


def ranks_by_float64(queries, targets, candidates):
    cosines = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    right = cosines[np.arange(len(queries)), targets]
    return (~(cosines < right[:, None] - ranking.TIE)).sum(1) - 1


@pytest.mark.parametrize("scores", [2**22, 64**2, 33**2, 7**2])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_ranks_are_float64s_for_any_block_and_number_of_devices(monkeypatch, scores, devices):
    queries, candidates, targets = crowded()
    expected = ranks_by_float64(queries, targets, candidates)
    single = queries @ candidates.T
    by_float32 = (~(single < single[np.arange(300), targets][:, None] - np.float32(ranking.TIE))).sum(1) - 1
    assert (by_float32 != expected).any()  # what the last bits of float32 would decide otherwise
    monkeypatch.setattr(ranking, "BLOCK_SCORES", scores)
    some = jax.local_devices()[:devices]
    monkeypatch.setattr(ranking.jax, "local_devices", lambda: some)
    np.testing.assert_array_equal(ranks(queries, targets, candidates, np.arange(200)), expected)


@pytest.mark.parametrize("seed", range(4))
def test_products_off_by_less_than_the_doubt_change_no_rank(monkeypatch, seed):
    """As another chip's would be: the rounding of its products is drawn at random."""
    queries, candidates, targets = crowded()
    exact = ranking._cosines

    def rounded_otherwise(queries_bE, candidates_cE):
        scores_bc = exact(queries_bE, candidates_cE)
        off_bc = jax.random.uniform(jax.random.key(seed), scores_bc.shape, minval=-1, maxval=1)
        return scores_bc + 0.6 * ranking.DOUBT * off_bc

    monkeypatch.setattr(ranking, "_cosines", rounded_otherwise)
    monkeypatch.setattr(ranking, "_count", jax.jit(ranking._count.__wrapped__))
    found = ranks(queries, targets, candidates, np.arange(200))
    np.testing.assert_array_equal(found, ranks_by_float64(queries, targets, candidates))


def test_rows_of_some_hosts_have_the_ranks_that_they_have_among_all():
    queries, candidates, targets = crowded()
    whole = ranks(queries, targets, candidates, np.arange(200))
    parts = [ranks(queries[rows], targets[rows], candidates, np.arange(200)) for rows in np.split(np.arange(300), 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_several_right_answers_are_counted_once_and_the_best_of_them_decides():
    queries, candidates, _ = crowded()
    right = np.random.default_rng(0).random((300, 200)) < 0.03
    cosines = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    best = np.where(right, cosines, -np.inf).max(1)
    expected = (~right & ~(cosines < best[:, None] - ranking.TIE)).sum(1)
    expected[~right.any(1)] = 200
    np.testing.assert_array_equal(ranking.ranks(queries, candidates, np.nonzero(right)), expected)


def test_a_duplicate_counts_against_the_model_in_whatever_block_it_stands(monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 16**2)
    candidates = random_unit(0, 100)
    candidates[77] = candidates[3]
    found = ranks(candidates, np.arange(100), candidates, np.arange(100))
    assert np.flatnonzero(found).tolist() == [3, 77] and found.max() == 1


def test_ranks_take_no_memory_for_all_pairs():
    """A million queries and candidates: what is compiled has a block's shapes, and holds one block of scores."""
    side = 2048
    row, index = jax.ShapeDtypeStruct((side,), np.float32), jax.ShapeDtypeStruct((side,), np.int32)
    x_bE, span = jax.ShapeDtypeStruct((side, 512), np.float32), jax.ShapeDtypeStruct((2,), np.int32)
    assert ranking._side(10**6, math.isqrt(ranking.BLOCK_SCORES)) == side
    memory = ranking._count.lower(x_bE, row, row, index, x_bE, span).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * side**2


def test_sets_of_like_sizes_share_a_compilation():
    ranking._count.clear_cache()
    for rows, columns in ((700, 300), (900, 500), (901, 257)):
        queries, candidates = random_unit(0, rows), random_unit(1, columns)
        ranks(queries, np.arange(rows) % columns, candidates, np.arange(columns))
    assert ranking._count._cache_size() == 1


def test_a_block_holds_no_more_scores_than_it_may(monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 90)
    sizes = [scores.size for _, scores in ranking.score_blocks(random_unit(0, 50), random_unit(1, 30))]
    assert max(sizes) <= 90 and sum(sizes) == 50 * 30


def test_ties_count_against_the_model():
    one = np.ones((1, 8), np.float32)
    several = np.ones((5, 8), np.float32)
    assert ranks(one, np.array([2]), several, np.arange(5)).tolist() == [4]


@pytest.mark.parametrize("angle, ahead", [(0.0, 1), (4e-4, 1), (1e-2, 0)])
def test_a_lead_within_rounding_is_a_tie(angle, ahead):
    right, wrong = [1, 0], [np.cos(angle), np.sin(angle)]  # cosines 1 and 1 - angle²/2
    candidates = np.array([right, wrong], np.float32)
    assert ranks(candidates[:1], np.array([0]), candidates, np.arange(2)).tolist() == [ahead]


def test_equal_embeddings_tie_wherever_blas_rounds_them():
    row = random_unit(3, 1, width=509)  # odd sizes reach the edges of BLAS's blocks
    found = ranks(np.repeat(row, 67, 0), np.arange(67), np.repeat(row, 67, 0), np.arange(67))
    assert found.tolist() == [66] * 67


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 0.0])
def test_a_query_without_direction_is_a_miss_and_spoils_no_other(broken):
    images = texts = np.eye(6, dtype=np.float32)
    images = images.copy()
    images[2] = broken
    assert ranks(images, np.arange(6), texts, np.arange(6)).tolist() == [0, 0, 6, 0, 0, 0]


def test_a_broken_wrong_candidate_stands_before_the_right_one():
    texts = np.eye(6, dtype=np.float32)
    texts[5] = np.nan
    assert ranks(np.eye(6, dtype=np.float32), np.arange(6), texts, np.arange(6)).tolist() == [1, 1, 1, 1, 1, 6]


def test_one_broken_picture_of_several_leaves_the_others_to_find():
    images = np.array([[np.nan, 0], [1, 0], [0, 1]], np.float32)
    assert ranks(np.eye(2, dtype=np.float32), np.array([0, 1]), images, np.array([0, 0, 1])).tolist() == [0, 1]


@pytest.mark.parametrize("candidates, right, k", [(10, 1, 1), (10, 1, 5), (12, 3, 5), (12, 9, 5), (300, 40, 10)])
def test_chance_is_hypergeometric(candidates, right, k):
    exact = 1 - Fraction(math.comb(candidates - right, k), math.comb(candidates, k))
    assert chance_of_recall(candidates, np.array([right]), k) == pytest.approx(float(exact), abs=ROUNDING)


def test_chance_is_what_random_orders_reach():
    targets = np.repeat(np.arange(8), [1, 1, 2, 2, 3, 3, 4, 4])
    found = []
    for seed in range(300):
        embedder = Given(random_unit(seed, 20), random_unit(seed + 10_000, 8))
        metrics = retrieval(embedder, eval_set(targets, 8))
        found.append([metrics[f"retrieval/pairs/{way}/recall_at_5"] for way in ("image_to_text", "text_to_image")])
    expected = [metrics[f"retrieval/pairs/{way}/recall_at_5/chance"] for way in ("image_to_text", "text_to_image")]
    # 300 means over 20 pictures or 8 texts: a standard error of 0.01 at most.
    np.testing.assert_allclose(np.mean(found, 0), expected, atol=0.04)


def test_a_k_above_the_candidates_is_left_out():
    metrics = retrieval(Given(random_unit(0, 12), random_unit(1, 4)), eval_set(np.arange(12) % 4, 4))
    assert {k.rpartition("/")[2] for k in metrics if "image_to_text/recall" in k} == {
        "recall_at_1",
        "candidates",
        "chance",
        "ci_low",
        "ci_high",
    }
    assert "retrieval/pairs/text_to_image/recall_at_10" in metrics


def test_wordings_of_one_text_are_averaged_as_unit_vectors():
    texts = np.array([[9, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)  # the first is long: it must not weigh more
    images = np.array([[0.6, 0.8, 0], [0, 0, 1]], np.float32)
    pairs = EvalDataset("pairs", [b"0", b"1"], [("0", "1"), ("2",)], np.array([0, 1]))
    _, averaged = embed_set(Given(images, texts), pairs)
    np.testing.assert_allclose(averaged, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": []}, "0 pictures"),
        ({"texts": []}, "0 texts"),
        ({"targets": np.array([0])}, "1 targets for 2 pictures"),
        ({"targets": np.array([0, 2])}, "indices 0 to 1"),
        ({"targets": np.array([-1, 0])}, "indices 0 to 1"),
        ({"texts": [("0",), ()]}, "text 1 .* no wording"),
    ],
)
def test_a_set_that_does_not_fit_together_is_refused(change, message):
    pairs = dataclasses.replace(eval_set([0, 1], 2), **change)
    with pytest.raises(ValueError, match=message):
        retrieval(Given(random_unit(0, 2), random_unit(1, 2)), pairs)


def test_an_embedder_that_loses_rows_is_refused():
    class Losing(Given):
        def image(self, images):
            return super().image(images)[:-1]

    with pytest.raises(ValueError, match="1 rows for the 2 pictures"):
        retrieval(Losing(random_unit(0, 2), random_unit(1, 2)), eval_set([0, 1], 2))
