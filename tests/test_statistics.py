"""Intervals and tests of significance: against plain loops, and their coverage on simulated rankings."""

from math import comb

import numpy as np
import pytest

from data.annotations import Annotations
from retrieval.rankings import Rankings, keep
from retrieval.rerank import Ranking, Shortlists
from retrieval.statistics import KEYS, draws, hit_counts, interval, mcnemar, paired_difference, recall_intervals
from tests.test_rankings import random_ranking
from tests.test_train import ROOT


def rankings_of(i2t: np.ndarray, t2i: np.ndarray, per_image: int) -> Rankings:
    """Kept rankings of dense scores (N, M) and (M, N)."""
    images, captions = i2t.shape
    table = Annotations(
        "custom test", [ROOT / "rows.json"], [f"{i}.png" for i in range(images)], np.arange(images),
        [str(i) for i in range(captions)], np.repeat(np.arange(images), per_image),
    )  # fmt: skip
    lists = Shortlists(
        np.tile(np.arange(captions, dtype=np.int32), (images, 1)), i2t,
        np.tile(np.arange(images, dtype=np.int32), (captions, 1)), t2i,
    )  # fmt: skip
    return keep(Ranking(lists, lists, 0), table, "test")


def test_counts_are_those_of_a_loop_over_images():
    ranking, table = random_ranking(3)
    kept = keep(ranking, table, "test")
    hits, asked = hit_counts(kept)
    for column, key in enumerate(KEYS):
        way, k = key[:3], int(key[5:])
        place, ids = kept.direction(way).itm.place, kept.image_ids if way == "txt" else kept.caption_ids
        for cluster, id_ in enumerate(np.unique(kept.image_ids)):
            queries = [q for q in range(len(ids)) if ids[q] == id_ and kept.direction(way).asked[q]]
            assert asked[cluster, column] == len(queries)
            assert hits[cluster, column] == sum(0 <= place[q] < k for q in queries)
    assert 100 * hits.sum(0) / asked.sum(0) == pytest.approx([kept.recall()[key] for key in KEYS])


def test_draws_take_images_with_all_their_queries():
    """Two images, all right and all wrong: a Recall by image is 0, 50 or 100."""
    drawn = draws(np.array([[5.0], [0.0]]), np.array([[5.0], [5.0]]), count=400)
    assert set(drawn[:, 0]) == {0.0, 50.0, 100.0}
    assert (drawn[:, 0] == drawn[:, 1]).all() and abs((drawn[:, 0] == 50).mean() - 0.5) < 0.1


@pytest.mark.parametrize("truth", [0.3, 0.7])
def test_intervals_cover_the_truth_at_their_rate(truth):
    """Captions of an image are hit together: a bootstrap by caption would cover far less often."""
    rng, images, per_image, trials = np.random.default_rng(0), 120, 5, 300
    by_image = by_caption = 0
    for _ in range(trials):
        hit = np.repeat(rng.random(images) < truth, per_image).astype(float)
        for size, rows in ((per_image, hit.reshape(images, per_image).sum(1)), (1, hit)):
            drawn = draws(rows[:, None], np.full((len(rows), 1), float(size)), count=300, seed=1)
            low, high = interval(drawn[:, 0])
            covered = low <= 100 * truth <= high
            by_image, by_caption = by_image + (covered and size > 1), by_caption + (covered and size == 1)
    assert 0.91 <= by_image / trials <= 0.98
    assert by_caption / trials < 0.8


def test_the_interval_holds_the_recall():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 120)) + 3 * (np.arange(40)[:, None] == np.arange(120)[None] // 3)
    kept = rankings_of(scores, scores.T, 3)
    found = kept.recall()
    for key, (low, high) in recall_intervals(kept).items():
        assert low <= found[key] <= high and (high - low < 40)


def test_a_run_against_itself_differs_by_nothing():
    ranking, table = random_ranking(4)
    kept = keep(ranking, table, "test")
    assert paired_difference(kept, kept) == (0, (0, 0)) and mcnemar(0, 0) == 1


def test_a_better_run_is_seen_by_the_paired_interval():
    rng = np.random.default_rng(1)
    right = np.arange(60)[:, None] == np.arange(180)[None] // 3
    noise = rng.standard_normal((60, 180))
    worse, better = noise + 1.5 * right, noise + 2.5 * right
    difference, (low, high) = paired_difference(rankings_of(better, better.T, 3), rankings_of(worse, worse.T, 3))
    assert 0 < low < difference < high


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 0), (5, 5), (9, 2), (40, 61), (1200, 900)])
def test_mcnemar_is_the_exact_binomial_test(won, lost):
    n, few = won + lost, min(won, lost)
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n)
    assert mcnemar(won, lost) == mcnemar(lost, won) == pytest.approx(expected)
