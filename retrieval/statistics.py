"""How sure a Recall is, and a difference of two: bootstrap by image, exact McNemar. Pure functions of numpy arrays.

The captions of an image are not independent: they are right or wrong together. So images are drawn, each with all of
its queries, not queries (a cluster bootstrap; Davison & Hinkley 1997, section 3.8). Percentile intervals.

Shapes: C images (clusters), m numbers, Q queries, B draws.
"""

from fractions import Fraction

import numpy as np

from retrieval.metrics import KS
from retrieval.rankings import WAYS, Rankings

DRAWS, SEED, LEVEL = 2000, 0, 0.95
KEYS = [f"{way}_r{k}" for way in WAYS for k in KS]


def clusters(rankings: Rankings) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each query asked, of both directions: images of one id, which share their right answers."""
    ids = np.unique(rankings.image_ids, return_inverse=True)[0]
    txt = np.searchsorted(ids, rankings.image_ids[rankings.txt.asked])
    img = np.searchsorted(ids, rankings.caption_ids[rankings.img.asked])
    return txt, img


def hit_counts(rankings: Rankings, order: str = "itm") -> tuple[np.ndarray, np.ndarray]:
    """Hits and queries by cluster: (C, 6) each, columns as KEYS."""
    size = len(np.unique(rankings.image_ids))
    hits, asked = np.zeros((size, len(KEYS))), np.zeros((size, len(KEYS)))
    for way, cluster in zip(WAYS, clusters(rankings), strict=True):
        for k in KS:
            column = KEYS.index(f"{way}_r{k}")
            hits[:, column] = np.bincount(cluster, rankings.hits(way, k, order), size)
            asked[:, column] = np.bincount(cluster, minlength=size)
    return hits, asked


def draws(hits: np.ndarray, asked: np.ndarray, count: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Recall in percent of `count` bootstrap draws, (B, m + 1) of hits and queries (C, m); the last is their mean."""
    rng, size = np.random.default_rng(seed), len(hits)
    found = []
    for start in range(0, count, 100):  # a few MB at a time
        weight = rng.multinomial(size, np.full(size, 1 / size), min(100, count - start)).astype(float)  # (100, C)
        found.append(100 * (weight @ hits) / np.maximum(weight @ asked, 1))
    recall = np.concatenate(found)
    return np.concatenate([recall, recall.mean(1, keepdims=True)], axis=1)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of draws (B,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def recall_intervals(rankings: Rankings, order: str = "itm") -> dict[str, tuple[float, float]]:
    """Intervals of the six Recalls and of r_mean, in percent."""
    drawn = draws(*hit_counts(rankings, order))
    return {key: interval(drawn[:, i]) for i, key in enumerate([*KEYS, "r_mean"])}


def paired_difference(one: Rankings, other: Rankings) -> tuple[float, tuple[float, float]]:
    """r_mean of `one` less that of `other`, in points, and its interval: both are drawn with the same images."""
    drawn = [draws(*hit_counts(rankings))[:, -1] for rankings in (one, other)]
    return one.recall()["r_mean"] - other.recall()["r_mean"], interval(drawn[0] - drawn[1])


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p: how likely so uneven a split of won + lost queries is if either were as likely."""
    n, few = won + lost, min(won, lost)
    term = total = 1
    for i in range(few):  # comb(n, i + 1) from comb(n, i)
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))
