"""Kept rankings: `ranking_{val,test}.npz` in a run folder, what reports read instead of evaluating again.

For each query: the place of its best right answer after re-ranking and by contrast, and the ten best of both orders.

Shapes: Q queries, N images, M captions, k shortlist. Directions have BLIP's prefixes: txt finds texts for images (Q =
N), img finds images for texts (Q = M).
"""

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.annotations import Annotations
from retrieval.metrics import KS, NOT_FOUND, places
from retrieval.rerank import Ranking

BEST = 10  # candidates that are kept of each order
ABSENT = -1  # a place outside the shortlist; a candidate of a gallery with fewer than BEST
WAYS = ("txt", "img")


class Order(NamedTuple):
    """One order of the candidates of each query."""

    place: np.ndarray  # (Q,) int32, 0-based, of the best right answer; ABSENT = not in the shortlist
    best: np.ndarray  # (Q, BEST) int32, gallery indices, the best first
    score: np.ndarray  # (Q, BEST) float32: matching logit + cosine, or the cosine alone


class Direction(NamedTuple):
    """Both orders of one direction."""

    itm: Order
    itc: Order
    asked: np.ndarray  # (Q,) bool: whether it counts, as it has a right answer in the gallery


@dataclass(frozen=True, eq=False)
class Rankings:
    """What one evaluation of one split found; `row` is the row of evaluate.txt or log.txt that belongs to it."""

    split: str
    images: list[str]
    image_ids: np.ndarray  # (N,)
    captions: list[str]
    caption_image: np.ndarray  # (M,), index into images or -1
    caption_ids: np.ndarray  # (M,)
    txt: Direction
    img: Direction
    k_test: int
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def gallery(self) -> str:
        """SHA-256 of images, captions and ids: equal for galleries whose rankings may be compared."""
        listed = self.images, self.image_ids.tolist(), self.captions, self.caption_image.tolist()
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def direction(self, way: str) -> Direction:
        return self.txt if way == "txt" else self.img

    def right(self, way: str, query: int) -> np.ndarray:
        """Gallery indices of the right answers of a query."""
        ids = (self.image_ids, self.caption_ids) if way == "txt" else (self.caption_ids, self.image_ids)
        return np.flatnonzero(ids[1] == ids[0][query])

    @cached_property
    def _captions_by_image(self) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in self.images]
        for index, caption in zip(self.caption_image.tolist(), self.captions, strict=True):
            if index >= 0:
                found[index].append(caption)
        return found

    def captions_of(self, image: int) -> list[str]:
        """The captions that were written for an image."""
        return self._captions_by_image[image]

    def hits(self, way: str, k: int, order: str = "itm") -> np.ndarray:
        """(queries asked,) bool: whether a right answer is among the first k."""
        place = getattr(self.direction(way), order).place[self.direction(way).asked]
        return (place >= 0) & (place < k)

    def recall(self, order: str = "itm") -> dict[str, float]:
        """BLIP's nine numbers in percent, of kept places."""
        found = {f"{way}_r{k}": 100 * float(self.hits(way, k, order).mean()) for way in WAYS for k in KS}
        means = {f"{way}_r_mean": sum(found[f"{way}_r{k}"] for k in KS) / len(KS) for way in WAYS}
        return found | means | {"r_mean": sum(means.values()) / 2}


def keep(ranking: Ranking, table: Annotations, split: str) -> Rankings:
    """What to keep of a split's ranking."""
    ids, text_ids = table.image_ids, table.caption_ids
    itm, itc = ranking.itm, ranking.itc
    txt = Direction(
        order(itm.i2t, itm.i2t_value, ids, text_ids),
        order(itc.i2t, itc.i2t_value, ids, text_ids),
        np.isin(ids, text_ids),
    )
    img = Direction(
        order(itm.t2i, itm.t2i_value, text_ids, ids),
        order(itc.t2i, itc.t2i_value, text_ids, ids),
        np.isin(text_ids, ids),
    )
    images, captions = list(table.images), list(table.captions)
    return Rankings(split, images, ids, captions, table.caption_image, text_ids, txt, img, itm.i2t.shape[1])


def best_first(candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(Q, k) places that sort candidates: the highest score first, on a tie the lower gallery index."""
    return np.lexsort((candidates, -scores), axis=1)


def order(candidates: np.ndarray, scores: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> Order:
    """Candidates and scores (Q, k) sorted: the highest score first, on a tie the lower gallery index."""
    place = places(candidates, scores, query_ids, gallery_ids)
    first = best_first(candidates, scores)[:, :BEST]  # (Q, at most BEST)
    best = np.full((len(candidates), BEST), ABSENT, np.int32)
    score = np.full((len(candidates), BEST), np.nan, np.float32)
    best[:, : first.shape[1]] = np.take_along_axis(candidates, first, 1)
    score[:, : first.shape[1]] = np.take_along_axis(scores, first, 1)
    return Order(np.where(place == NOT_FOUND, ABSENT, place).astype(np.int32), best, score)


# ---- files ----------------------------------------------------------------------------------------------------------


def rankings_file(folder: Path, split: str) -> Path:
    return folder / f"ranking_{split}.npz"


def save_rankings(folder: Path, rankings: Rankings, row: dict[str, Any]) -> Path:
    """Write the file of the split, with the row of its evaluation, in one step."""
    path = rankings_file(folder, rankings.split)
    texts = {"images": rankings.images, "captions": rankings.captions, "row": row}
    arrays: dict[str, Any] = {key: _as_bytes(value) for key, value in texts.items()}
    arrays |= {key: getattr(rankings, key) for key in ("image_ids", "caption_image", "caption_ids", "k_test", "split")}
    arrays["gallery_sha256"] = rankings.gallery
    for way in WAYS:
        direction = rankings.direction(way)
        arrays[f"{way}_asked"] = direction.asked
        for name, kept in (("itm", direction.itm), ("itc", direction.itc)):
            arrays |= {f"{way}_{name}_{key}": value for key, value in kept._asdict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_rankings(path: str | os.PathLike) -> Rankings:
    """Read such a file; ValueError when it is missing, damaged, or of another kind."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there are no kept rankings: evaluate the run, which writes them (--evaluate).")
    try:
        with np.load(path, allow_pickle=False) as file:
            ways = {way: Direction(*_read_orders(file, way), file[f"{way}_asked"]) for way in WAYS}
            return Rankings(
                str(file["split"]), _from_bytes(file["images"]), file["image_ids"], _from_bytes(file["captions"]),
                file["caption_image"], file["caption_ids"], ways["txt"], ways["img"], int(file["k_test"]),
                _from_bytes(file["row"]),
            )  # fmt: skip
    except (KeyError, ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a file of kept rankings, or damaged ({error}): evaluate again.") from None


def _read_orders(file: Any, way: str) -> tuple[Order, Order]:
    itm, itc = (Order(*(file[f"{way}_{name}_{key}"] for key in Order._fields)) for name in ("itm", "itc"))
    return itm, itc


def _as_bytes(value: Any) -> np.ndarray:
    """JSON in UTF-8: numpy would store texts at four bytes a letter, each as long as the longest."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def _from_bytes(value: np.ndarray) -> Any:
    return json.loads(value.tobytes())
