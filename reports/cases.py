"""Which queries of an evaluation a report shows, and what they were answered with.

A query's place counts from 1 here, as people say it; None = not in the shortlist.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retrieval.rankings import ABSENT, Rankings

WAY_WORDS = {"txt": "image → text", "img": "text → image"}
SHOWN = 5  # candidates of a case
MISSES = ("Worst misses", "Near misses", "Lost by re-ranking")


@dataclass(frozen=True)
class Candidate:
    """One answer: an image or a caption by its index, -1 for none."""

    image: int
    caption: int
    score: float  # 0 where the candidate stands for a right answer itself
    right: bool
    same_words: bool = False  # as a right answer, though it belongs to another image: a false negative


@dataclass(frozen=True)
class Case:
    """One query, its right answers and the best candidates of both orders."""

    way: str
    image: int  # the query, or -1
    caption: int
    right: list[Candidate]
    found: list[Candidate]  # re-ranked
    found_itc: list[Candidate]
    place: int | None
    place_itc: int | None

    @property
    def pair(self) -> tuple[int, int]:
        """Image and caption of the query and its first right answer."""
        right = self.right[0]
        return (self.image, right.caption) if self.way == "txt" else (right.image, self.caption)


@dataclass(frozen=True)
class Group:
    """Cases of one kind; `count`: how many queries are of that kind, `how`: how the shown ones were chosen."""

    title: str
    how: str
    count: int
    cases: list[Case]


def outcomes(rankings: Rankings, way: str) -> dict[str, np.ndarray]:
    """Each query asked falls into one kind: (Q,) masks by name."""
    direction = rankings.direction(way)
    itm, itc, asked = direction.itm.place, direction.itc.place, direction.asked
    first = (itm == 0) & asked
    return {
        "right": first & (itc == 0),
        "saved": first & (itc != 0),
        "lost": (itm > 0) & (itc == 0) & asked,
        "behind": (itm > 0) & (itc > 0) & asked,
        "absent": (itm == ABSENT) & asked,
    }


OUTCOME_WORDS = {
    "right": "right at rank 1, by contrast already",
    "saved": "re-ranking saved it: first now, not by contrast",
    "lost": "re-ranking lost it: first by contrast, not now",
    "behind": "in the shortlist, first in neither order",
    "absent": "not in the shortlist: re-ranking never saw it",
}


def choose_groups(rankings: Rankings, way: str, number: int, seed: int = 0) -> list[Group]:
    """Worst misses, near misses, what re-ranking lost and saved, and random hits."""
    direction, kinds = rankings.direction(way), outcomes(rankings, way)
    place, rng = direction.itm.place, np.random.default_rng(seed)
    far = np.where(place == ABSENT, np.iinfo(np.int32).max, place)
    gap = direction.itm.score[:, 0] - _right_scores(rankings, way)

    def worst(queries: np.ndarray) -> np.ndarray:
        return queries[np.argsort(-far[queries], kind="stable")]

    def nearest(queries: np.ndarray) -> np.ndarray:
        return queries[np.argsort(gap[queries], kind="stable")]

    def at_random(queries: np.ndarray) -> np.ndarray:
        return rng.permutation(queries)

    missed = np.flatnonzero(direction.asked & (place != 0))
    near = missed[np.isfinite(gap[missed])]
    plan: list[tuple[str, str, np.ndarray, Callable[[np.ndarray], np.ndarray]]] = [
        ("Worst misses", "those whose right answer is furthest down, or not in the shortlist", missed, worst),
        ("Near misses", "those that lack the least score to be first", near, nearest),
        ("Lost by re-ranking", f"drawn by chance (seed {seed})", np.flatnonzero(kinds["lost"]), at_random),
        ("Saved by re-ranking", f"drawn by chance (seed {seed})", np.flatnonzero(kinds["saved"]), at_random),
        ("Hits", f"drawn by chance (seed {seed})", np.flatnonzero(direction.asked & (place == 0)), at_random),
    ]
    return [
        Group(title, how, len(queries), [case(rankings, way, int(q)) for q in choose(queries)[:number]])
        for title, how, queries, choose in plan
    ]


def _right_scores(rankings: Rankings, way: str) -> np.ndarray:
    """The best score of a right answer among the kept candidates (Q,), nan where there is none."""
    ids = (rankings.image_ids, rankings.caption_ids)
    query_ids, gallery_ids = ids if way == "txt" else ids[::-1]
    kept = rankings.direction(way).itm
    right = (gallery_ids[kept.best] == query_ids[:, None]) & (kept.best != ABSENT)
    best = np.where(right, kept.score, -np.inf).max(1)
    return np.where(np.isfinite(best), best, np.nan)


def case(rankings: Rankings, way: str, query: int) -> Case:
    """What a report shows of one query."""
    direction, right = rankings.direction(way), rankings.right(way, query)
    words = {rankings.captions[query]} if way == "img" else {rankings.captions[i] for i in right}

    def candidate(index: int, score: float) -> Candidate:
        is_right = bool(np.isin(index, right))
        if way == "txt":
            same = not is_right and rankings.captions[index] in words
            return Candidate(-1, index, score, is_right, same)
        others = rankings.captions_of(index)
        return Candidate(index, -1, score, is_right, not is_right and any(c in words for c in others))

    def listed(best: np.ndarray, scores: np.ndarray) -> list[Candidate]:
        pairs = zip(best[:SHOWN].tolist(), scores[:SHOWN].tolist(), strict=True)
        return [candidate(index, score) for index, score in pairs if index != ABSENT]

    places = [int(order.place[query]) for order in (direction.itm, direction.itc)]
    return Case(
        way, query if way == "txt" else -1, query if way == "img" else -1,
        [candidate(int(i), 0.0) for i in right[:SHOWN]],
        listed(direction.itm.best[query], direction.itm.score[query]),
        listed(direction.itc.best[query], direction.itc.score[query]),
        *(None if place == ABSENT else place + 1 for place in places),
    )  # fmt: skip


def false_negatives(rankings: Rankings, way: str) -> int:
    """Queries missed at rank 1 whose first answer has the words of a right one, on another image."""
    direction = rankings.direction(way)
    missed = np.flatnonzero(direction.asked & (direction.itm.place != 0))
    return sum(found.same_words for query in missed for found in case(rankings, way, int(query)).found[:1])


def compare(one: Rankings, other: Rankings, way: str) -> dict[str, np.ndarray]:
    """Right at rank 1 in `one` alone ('won'), in `other` alone ('lost'), in both, in neither: (Q,) masks."""
    if one.gallery != other.gallery:
        raise ValueError(
            f"the two runs were evaluated on different galleries ({_size(one)}; {_size(other)}; or other words): "
            "evaluate both on the same files"
        )
    first, second = (r.direction(way).itm.place == 0 for r in (one, other))
    asked = one.direction(way).asked
    return {
        "won": first & ~second & asked, "lost": second & ~first & asked,
        "both": first & second & asked, "neither": ~first & ~second & asked,
    }  # fmt: skip


def _size(rankings: Rankings) -> str:
    return f"{len(rankings.images)} images and {len(rankings.captions)} captions of {rankings.split}"
