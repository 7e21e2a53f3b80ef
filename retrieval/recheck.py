"""Recall of float32 from scores in bfloat16: which pairs to score again, so that no Recall@K depends on the rounding.

A query counts for Recall@K when fewer than K wrong candidates score above its best right one. The right candidates are
scored again in float32, as is a random sample, which measures bfloat16's error. After that the only candidates that
matter are those so near to the best right one that the error may have put them on the wrong side of it, and only where
a Recall@K depends on them. This is not proven but checked: every pair scored again tells whether the margin held.

Shapes: P pairs, Q queries, k shortlist.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from retrieval.metrics import KS

log = logging.getLogger(__name__)
MARGIN = 4  # how many times the largest error seen still counts as near
SAMPLE, SAMPLE_SHARE = 10_000, 50  # random pairs that measure the error: at most so many, and 1 of 50


class Queries(NamedTuple):
    """The shortlists of one direction, each (Q, k)."""

    pair: np.ndarray  # index of the candidate's pair
    cosine: np.ndarray  # what is added to the pair's score
    right: np.ndarray  # whether the candidate is a right answer


def recheck_in_float32(
    screened: np.ndarray, directions: Sequence[Queries], rescore: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Scores (P,) that give float32's Recall: `screened` (P,), corrected by `rescore(pair indices)` where it matters.

    Should a pair turn out to differ by more than the margin, the margin grows and the search is repeated.
    """
    scores, known = screened.copy(), np.zeros(len(screened), dtype=bool)
    pending, margin, violations = _first_pairs(len(screened), directions), 0.0, 0
    while len(pending) > 0:
        scores[pending] = rescore(pending)
        known[pending] = True
        error = np.abs(scores[pending] - screened[pending])
        log.info("bf16: %d pairs scored again in float32, largest difference %.2g", len(pending), error.max())
        if error.max() > margin:
            violations += int(np.count_nonzero(error > margin)) if margin else 0
            margin = MARGIN * float(error.max())
        pending = np.flatnonzero(open_pairs(scores, known, directions, margin))
    log.info(
        "bf16: %d of %d pairs (%.2f %%) scored again in float32, margin %.2g, exceeded by %d pairs",
        np.count_nonzero(known), len(known), 100 * known.mean(), margin, violations,
    )  # fmt: skip
    return scores


def _first_pairs(num_pairs: int, directions: Sequence[Queries]) -> np.ndarray:
    """Right answers, and random pairs to measure the error on, the same in every process."""
    chosen = np.zeros(num_pairs, dtype=bool)
    for queries in directions:
        chosen[queries.pair[queries.right]] = True
    sample = min(SAMPLE, -(-num_pairs // SAMPLE_SHARE))
    chosen[np.random.default_rng(0).choice(num_pairs, sample, replace=False)] = True
    return np.flatnonzero(chosen)


def open_pairs(scores: np.ndarray, known: np.ndarray, directions: Sequence[Queries], margin: float) -> np.ndarray:
    """Which pairs (P,) may be on the wrong side of a best right answer, where a query's Recall@K depends on them.

    `known` (P,) marks scores without error, those of all right answers among them.
    """
    is_open = np.zeros(len(scores), dtype=bool)
    for queries in directions:
        score = scores[queries.pair] + queries.cosine  # (Q, k)
        best = np.where(queries.right, score, -np.inf).max(1, keepdims=True)  # (Q, 1)
        unsure = ~queries.right & ~known[queries.pair] & (np.abs(score - best) <= margin)  # (Q, k)
        tied = ~queries.right & (score == best)  # (Q, k) the metric decides on which side these count
        fewest = ((score > best) & ~unsure).sum(1)  # (Q,) wrong candidates ahead, at least ...
        most = fewest + (unsure | tied).sum(1)  # (Q,) ... and at most
        matters = np.any([(fewest < k) & (k <= most) for k in KS], axis=0)  # (Q,)
        is_open[queries.pair[unsure & matters[:, None]]] = True
    return is_open
