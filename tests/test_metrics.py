"""Recall@K on hand-made tables."""

import numpy as np
import pytest

from retrieval.metrics import NOT_FOUND, chance_metrics, places, recall, retrieval_metrics

IDS = np.arange(4)


def dense(scores) -> tuple[np.ndarray, np.ndarray]:
    """A full matrix as shortlists in descending order."""
    scores = np.asarray(scores, dtype=np.float32)
    order = np.argsort(-scores, axis=1)
    return order, np.take_along_axis(scores, order, axis=1)


def test_places_of_a_hand_made_matrix():
    scores = [[0.9, 0.1, 0.2, 0.3], [0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.0, 0.3], [0.1, 0.2, 0.3, 0.4]]
    assert places(*dense(scores), IDS, IDS).tolist() == [0, 1, 3, 0]


def test_several_right_answers_count_the_best():
    texts_of = np.array([0, 0, 1, 1])
    scores = [[0.1, 0.3, 0.2, 0.0], [0.9, 0.8, 0.7, 0.6]]
    assert places(*dense(scores), np.array([0, 1]), texts_of).tolist() == [0, 2]


def test_several_images_of_one_id_are_all_right():
    images = np.array([5, 5, 9])  # two drawings of concept 5
    assert places(*dense([[0.2, 0.9, 0.5]]), np.array([5]), images).tolist() == [0]


@pytest.mark.parametrize("kind", [np.int32, np.int64])  # a shortlist has 32-bit indices
def test_order_of_the_shortlist_does_not_matter_and_ties_go_to_the_lower_index(kind):
    candidates, scores = np.array([[3, 1, 0]], kind), np.array([[0.5, 0.5, 0.5]])
    assert [places(candidates, scores, np.array([q]), IDS)[0] for q in range(4)] == [0, 1, NOT_FOUND, 2]


def test_a_right_answer_outside_the_shortlist_is_never_found():
    rank = places(np.array([[1, 2]]), np.array([[0.1, 0.2]]), np.array([0]), IDS)
    assert rank.tolist() == [NOT_FOUND]
    assert recall(rank, "txt") == {"txt_r1": 0, "txt_r5": 0, "txt_r10": 0, "txt_r_mean": 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        places(np.array([[0, 1]]), np.array([[bad, 0.2]]), np.array([0]), IDS)


def test_random_matrices_equal_the_sorted_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        images, texts = rng.integers(0, 6, 7), rng.integers(0, 6, 11)
        scores = rng.standard_normal((7, 11)).astype(np.float32)
        got = places(*dense(scores), images, texts)
        for row, image, rank in zip(scores, images, got, strict=True):
            hits = np.flatnonzero(texts[np.argsort(-row)] == image)
            assert rank == (hits[0] if len(hits) else NOT_FOUND)


def test_blips_nine_numbers():
    order = np.tile(np.arange(4), (4, 1))
    scores = -np.tile(np.arange(4.0), (4, 1))  # every query ranks the gallery 0, 1, 2, 3
    m = retrieval_metrics(order, scores, order, scores, IDS, IDS)
    assert m["txt_r1"] == m["img_r1"] == 25 and m["txt_r5"] == m["img_r10"] == 100
    assert m["r_mean"] == m["txt_r_mean"] == pytest.approx(225 / 3)
    assert list(m) == [
        "txt_r1",
        "txt_r5",
        "txt_r10",
        "txt_r_mean",
        "img_r1",
        "img_r5",
        "img_r10",
        "img_r_mean",
        "r_mean",
    ]


def test_chance_is_what_a_random_order_gives():
    image_ids, text_ids = np.arange(40), np.repeat(np.arange(40), 3)
    chance = chance_metrics(image_ids, text_ids)
    assert chance["img_r1"] == pytest.approx(2.5) and chance["img_r10"] == pytest.approx(25)
    assert chance["txt_r1"] == pytest.approx(2.5)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(120) for _ in range(4000)])
    hit = (text_ids[order[:, :5]] == 7).any(1).mean() * 100
    assert chance["txt_r5"] == pytest.approx(hit, abs=1.5)


def test_what_has_no_right_answer_is_no_query():
    """A distractor: it is in the gallery of the other direction, and takes places there."""
    chance = chance_metrics(np.array([0, 1]), np.array([0, 0, 2, 2]))
    assert chance["txt_r1"] == pytest.approx(50) and chance["img_r1"] == pytest.approx(50)
