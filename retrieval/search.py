"""Queries against an index: the nearest pictures by contrast, then a better order by matching, or "nothing matches".

Exact: scores are computed in float32, and those near the k-th best again in float64, so that the order is that of a
float64 sort of everything, with ties to the picture that was indexed first.

Shapes: n pictures, E embedding width, q queries, k hits, T image tokens, V their width.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.loading import Blip
from retrieval.index import Entry, IndexFolder
from utils import Progress

log = logging.getLogger("blip")

CHUNK = 1 << 16  # rows of a part that are scored at once
SCORES = 1 << 26  # cosines that are held at once
MARGIN = 1e-5  # beyond which float32 and float64 cosines do not differ
CACHE_BYTES = 512 << 20  # of image tokens of recent shortlists


class Hit(NamedTuple):
    """One picture that was found; ranks count from 1, those of contrast alone in `rank_itc`."""

    rank: int
    number: int  # of the picture in the index, its place in `Searcher.entries`
    path: str
    cosine: float
    match: float | None = None  # P(match), of re-ranked hits
    score: float | None = None  # matching logit + cosine, as evaluation ranks
    rank_itc: int | None = None


class Answer(NamedTuple):
    """The hits of one query: by contrast, re-ranked, and whether any of them matches."""

    query: str
    contrast: list[Hit]
    reranked: list[Hit]
    matches: bool | None  # None: not re-ranked, so nothing is known
    threshold: float


class VectorStore(Protocol):
    """Where vectors are searched."""

    def nearest(self, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """For each query (q, E) the k best pictures, (number, cosine) each, the best first."""


class LocalStore:
    """All vectors of an index, mapped from its files."""

    def __init__(self, index: IndexFolder, entries: Sequence[Entry]):
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # vectors, rows, numbers
        by_part: dict[str, list[tuple[int, int]]] = {}
        for number, entry in enumerate(entries):
            assert entry.part is not None and entry.row is not None
            by_part.setdefault(entry.part, []).append((entry.row, number))
        for part, places in by_part.items():
            rows, numbers = (np.array(x, np.int64) for x in zip(*places, strict=True))
            vectors = index.vectors(part)
            if len(vectors) <= rows.max():
                raise ValueError(f"{index.folder / part}.f32 is cut short: make the index anew.")
            self.parts.append((vectors, rows, numbers))
        self.size = len(entries)

    def nearest(self, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        if not self.size:
            return [[] for _ in queries]
        scores = self.scores(queries)  # (q, n)
        return [self._best(query, row, min(k, self.size)) for query, row in zip(queries, scores, strict=True)]

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Cosines (q, n) in float32."""
        scores = np.empty((len(queries), self.size), np.float32)
        for vectors, rows, numbers in self.parts:
            every = np.concatenate(
                [queries @ vectors[start : start + CHUNK].T for start in range(0, len(vectors), CHUNK)], axis=1
            )
            scores[:, numbers] = every[:, rows]
        return scores

    def _best(self, query: np.ndarray, scores: np.ndarray, k: int) -> list[tuple[int, float]]:
        kth = np.partition(scores, self.size - k)[self.size - k]
        near = np.flatnonzero(scores >= kth - MARGIN)
        exact = self.gather(near).astype(np.float64) @ query.astype(np.float64)
        order = np.lexsort((near, -exact))[:k]
        return [(int(near[i]), float(exact[i])) for i in order]

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors (k, E) of some pictures."""
        found = np.empty((len(numbers), self.parts[0][0].shape[1]), np.float32)
        for vectors, rows, own in self.parts:
            at = np.searchsorted(own, numbers)
            inside = (at < len(own)) & (own[np.minimum(at, len(own) - 1)] == numbers)
            found[inside] = vectors[rows[at[inside]]]
        return found


class TokenCache:
    """Image tokens of the pictures that were looked at last, at most CACHE_BYTES of them."""

    def __init__(self, most: int = CACHE_BYTES):
        self.most, self.held = most, 0
        self.tokens: OrderedDict[int, Tensor] = OrderedDict()

    def get(self, number: int) -> Tensor | None:
        if number in self.tokens:
            self.tokens.move_to_end(number)
        return self.tokens.get(number)

    def put(self, number: int, tokens: Tensor) -> None:
        self.tokens[number] = tokens
        self.held += tokens.nbytes
        while self.held > self.most and self.tokens:
            self.held -= self.tokens.popitem(last=False)[1].nbytes


class Searcher:
    """An open index and the model that made it."""

    def __init__(self, index: IndexFolder, blip: Blip, vectors: VectorStore | None = None):
        self.index, self.blip = index, blip
        self.entries = [entry for _, entry in index.numbered()]
        self.vectors = vectors or LocalStore(index, self.entries)
        self.store = index.pictures(blip.rule)
        self.cache = TokenCache()

    def texts(self, queries: Sequence[str], top: int, rerank: int = 0) -> list[Answer]:
        """Pictures for each sentence; `rerank` of the nearest are put into matching's order (0: none)."""
        for query in queries:
            require_text(query)
        feat = self.blip.text_features(queries).numpy()
        at_once = max(1, SCORES // max(1, len(self.entries)))
        answers, progress = [], Progress("queries", len(queries), "queries")
        for start in range(0, len(queries), at_once):
            part = slice(start, start + at_once)
            nearest = self.vectors.nearest(feat[part], max(top, rerank))
            for query, found in zip(queries[part], nearest, strict=True):
                answers.append(self._answer(query, found, top, rerank))
                progress.add(1)
        return answers

    def image(self, picture: Image.Image | Path, top: int) -> list[Hit]:
        """The pictures most like another one, by contrast: matching compares a picture with words only."""
        picture = picture if isinstance(picture, Image.Image) else self.load(picture)
        (found,) = self.vectors.nearest(self.blip.image_features([picture]).numpy(), top)
        return self._hits(found)

    def load(self, path: Path) -> Image.Image:
        """The picture of a query in RGB, upright as the index's own are; ValueError when it cannot be read."""
        try:
            with Image.open(path) as image:
                return self.store.as_rgb(image)
        except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
            raise ValueError(f"image {path} cannot be read ({str(error) or type(error).__name__})") from None

    def _hits(self, found: Sequence[tuple[int, float]]) -> list[Hit]:
        return [
            Hit(rank, number, self.entries[number].name, cosine, rank_itc=rank)
            for rank, (number, cosine) in enumerate(found, 1)
        ]

    def _answer(self, query: str, found: Sequence[tuple[int, float]], top: int, rerank: int) -> Answer:
        threshold, hits = self.index.head.threshold, self._hits(found)
        if not rerank or not hits:
            return Answer(query, hits[:top], [], None, threshold)
        candidates, tokens = [], []
        for hit in hits[:rerank]:
            try:
                tokens.append(self.tokens(hit.number))
                candidates.append(hit)
            except ValueError as error:  # its file has changed since it was indexed
                log.warning("warning: left out of re-ranking: %s; update the index", error)
        if not candidates:
            return Answer(query, hits[:top], [], None, threshold)
        logits = torch.cat([self.blip.match_tokens(torch.stack(part), query) for part in _batches(tokens)])  # (k, 2)
        match, scores = logits.softmax(-1)[:, 1].tolist(), logits[:, 1].tolist()
        rated = [
            hit._replace(match=m, score=s + hit.cosine) for hit, m, s in zip(candidates, match, scores, strict=True)
        ]
        order = sorted(rated, key=lambda hit: (-(hit.score or 0), hit.number))
        reranked = [hit._replace(rank=rank) for rank, hit in enumerate(order, 1)]
        return Answer(query, hits[:top], reranked[:top], max(match) >= threshold, threshold)

    def tokens(self, number: int) -> Tensor:
        """Image tokens (T, V) of a picture: kept, or of the cache, or encoded again."""
        tokens = self.cache.get(number)
        if tokens is None:
            entry = self.entries[number]
            assert entry.part is not None and entry.row is not None
            if self.index.head.keep_tokens:
                tokens = self.index.tokens(entry.part, entry.row).float()
            else:
                tokens = self.blip.encode([self.store.load(entry.name)])[0][0].cpu()
            self.cache.put(number, tokens)
        return tokens


def require_text(query: str) -> None:
    """ValueError for what is empty, or no text: a byte that was not UTF-8, half of a letter."""
    try:
        if query.encode() and query.strip():
            return
    except UnicodeEncodeError:
        pass
    raise ValueError(f"the query {query[:80]!r} is empty, or not text in UTF-8")


def printable(path: str) -> str:
    """A path as one line of text: bytes that are none, and line ends, are written out."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def hit_json(hit: Hit, spell: Callable[[str], str] = str) -> dict[str, Any]:
    """A hit in plain values; `spell` writes its path."""
    return hit._asdict() | {"path": spell(hit.path)}


def as_json(answer: Answer, spell: Callable[[str], str] = str) -> dict[str, Any]:
    """An answer in plain values; by default a path that is no text keeps its bytes as Python spells them, \\udcXX."""
    lists = {key: [hit_json(hit, spell) for hit in getattr(answer, key)] for key in ("contrast", "reranked")}
    return answer._asdict() | lists


def _batches(tokens: list[Tensor], size: int = 32) -> list[list[Tensor]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]
