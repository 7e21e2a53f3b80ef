"""COCO's test split without its false negatives: the corrected annotations of ECCV Caption and CxC.

Sources: Chun et al. 2022 (ECCV Caption, arXiv 2204.03359; the package `eccv-caption`, MIT, has ids only, its own
measures and those of CxC); Parekh et al. 2021 (Crisscrossed Captions). Both extend the Karpathy test split: for some of
the queries (ECCV) or all of them (CxC), people have found more right answers than the one image and its five captions.

Needed are COCO's own ids: of an image from its file name, of a caption from the annotations (`sentids`) or, by its
words within its image, from COCO's captions_val2014.json in the folder of the annotations.

Shapes: N images, M captions, k shortlist.
"""

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.annotations import NO_SENTENCE, Annotations
from retrieval.rankings import best_first
from retrieval.rerank import Ranking, Shortlists
from transform.text import clean_caption

COCO_CAPTIONS = "captions_val2014.json"
WAYS = {"i2t": "txt", "t2i": "img"}  # the package's words: BLIP's
KS = (1, 5, 10)
NOBODY = range(-(10**9), 0)  # ids that nothing has


class Corrected(NamedTuple):
    """Numbers in percent, prefixed `eccv_` and `cxc_`, and lines for the log; without numbers, why there are none."""

    numbers: dict[str, float]
    lines: list[str]


def corrected_metrics(ranking: Ranking, table: Annotations) -> Corrected:
    """mAP@R, R-Precision and R@1 by ECCV Caption, and Recall by CxC, of the re-ranked lists of COCO's test split."""
    with warnings.catch_warnings(action="ignore"):  # that it reads JSON without ujson
        from eccv_caption import Metrics

        package = Metrics()
    try:
        image_ids, caption_ids, notes = coco_ids(table)
    except ValueError as error:
        return Corrected({}, [f"no corrected measures of COCO: {error}"])
    gts = {name: getattr(package, f"{name}_gts") for name in ("eccv", "cxc")}
    keys = {way: {key for gt in gts.values() for key in gt[way]} for way in WAYS}
    images, captions = keys["i2t"] - set(image_ids.tolist()), keys["t2i"] - set(caption_ids.tolist())
    if images or len(captions) > (caption_ids < 0).sum():  # more than the captions whose id is not known
        counts = f"{len(images)} images and {len(captions)} captions"
        notes.append(f"no corrected measures of COCO: {counts} of the corrected test split are not here")
        return Corrected({}, notes)
    found = retrieved(ranking.itm, image_ids, caption_ids)
    found["t2i"] |= {caption: list(NOBODY[: max(KS)]) for caption in captions}
    cut = {way: sum(len(right) > len(found[way][key]) for key, right in gts["eccv"][way].items()) for way in WAYS}
    if any(cut.values()):
        deep = ranking.itm.i2t.shape[1]
        notes.append(
            f"k_test {deep} cuts lists short of R for {cut['i2t']} images and {cut['t2i']} captions of ECCV Caption"
        )
        found = {way: padded(found[way], gts["eccv"][way]) for way in WAYS}
    with redirect_stderr(io.StringIO()):  # bars that cannot be turned off
        measures: dict[str, Mapping[str, float]] = package.eccv_metrics(found, "all")
        for k in KS:
            measures[f"cxc_r{k}"] = package.cxc_recalls(found, "all", K=k)
    numbers = {f"{name.partition('_')[0]}_{WAYS[way]}_{name.partition('_')[2]}": 100 * float(value)
               for name, by_way in measures.items() for way, value in by_way.items()}  # fmt: skip
    return Corrected(numbers, [*notes, *table_lines(numbers)])


def retrieved(lists: Shortlists, image_ids: np.ndarray, caption_ids: np.ndarray) -> dict[str, dict[int, list[int]]]:
    """The package's form of re-ranked lists: COCO id of a query: COCO ids of the candidates, the best first."""

    def by_id(candidates: np.ndarray, scores: np.ndarray, ids: np.ndarray, gallery: np.ndarray) -> dict[int, list[int]]:
        best = np.take_along_axis(candidates, best_first(candidates, scores), 1)
        return dict(zip(ids.tolist(), gallery[best].tolist(), strict=True))

    return {
        "i2t": by_id(lists.i2t, lists.i2t_value, image_ids, caption_ids),
        "t2i": by_id(lists.t2i, lists.t2i_value, caption_ids, image_ids),
    }


def padded(lists: dict[int, list[int]], gts: Mapping[int, list[int]]) -> dict[int, list[int]]:
    """Lists that reach R, the number of right answers, with ids that are nobody's: what is not there is wrong."""
    found = dict(lists)
    for key, right in gts.items():
        found[key] = lists[key] + list(NOBODY[max(KS) :][: max(0, len(right) - len(lists[key]))])
    return found


def table_lines(numbers: Mapping[str, float]) -> list[str]:
    """A small table under the usual one."""
    lines = [f"{'corrected COCO':18} {'image -> text':>24}  {'text -> image':>24}"]
    for title, keys in (
        ("ECCV mAP@R R-P R@1", ("eccv_{}_map_at_r", "eccv_{}_rprecision", "eccv_{}_r1")),
        ("CxC R@1 R@5 R@10", tuple(f"cxc_{{}}_r{k}" for k in KS)),
    ):
        txt, img = ("".join(f"{numbers[key.format(way)]:8.2f}" for key in keys) for way in ("txt", "img"))
        lines.append(f"{title:18} {txt}  {img}")
    return lines


def installed() -> bool:
    return find_spec("eccv_caption") is not None


# ---- COCO's ids -----------------------------------------------------------------------------------------------------


def coco_ids(table: Annotations) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """COCO's id of each image (N,) and caption (M,), and notes; ValueError where there is no way to know them.

    A caption without an id gets a negative one of its own, which is nobody's right answer.
    """
    numbers = [re.search(r"(\d{12})\.\w+$", name) for name in table.images]
    if not all(numbers):
        raise ValueError("the images do not have COCO's file names")
    image_ids = np.array([int(number[1]) for number in numbers if number], np.int64)
    if len(table.sentids) and (table.sentids != NO_SENTENCE).any():
        ids, source = table.sentids.copy(), "sentids"
    else:
        file = table.files[0].parent / COCO_CAPTIONS
        if not file.exists():
            raise ValueError(
                f"{table.source} has no ids of captions (sentids), and COCO's {COCO_CAPTIONS} is not beside it: put it "
                "there (annotations_trainval2014.zip of COCO has it)"
            )
        ids, source = ids_by_words(table, image_ids, file), COCO_CAPTIONS
    missing = ids == NO_SENTENCE
    ids[missing] = -1 - np.arange(missing.sum())
    notes = (
        [f"{missing.sum()} of {len(ids)} captions have no id in {source}: they count as wrong"] if missing.any() else []
    )
    return image_ids, ids, notes + same_words(table, source) * (source == COCO_CAPTIONS)


def ids_by_words(table: Annotations, image_ids: np.ndarray, file: Path) -> np.ndarray:
    """The id of each caption (M,), by its cleaned words among those of its image; NO_SENTENCE where there is none.

    Equal captions of one image take the ids in turn.
    """
    by_words: dict[tuple[int, str], list[int]] = {}
    for row in _coco_rows(file):
        by_words.setdefault((int(row["image_id"]), clean_caption(row["caption"])), []).append(int(row["id"]))
    found = []
    for image, caption in zip(table.caption_image.tolist(), table.captions, strict=True):
        ids = by_words.get((int(image_ids[image]), caption)) if image >= 0 else None
        found.append(ids.pop(0) if ids else NO_SENTENCE)
    return np.array(found, np.int64)


def same_words(table: Annotations, source: str) -> list[str]:
    """A note where an image has a caption twice, so that the words do not tell which id is whose."""
    pairs = Counter(zip(table.caption_image.tolist(), table.captions, strict=True))
    twice = sum(count for count in pairs.values() if count > 1)
    return (
        [f"{twice} captions have the words of another one of their image: {source} gives them ids in turn"]
        if twice
        else []
    )


def _coco_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not COCO's file of captions ({error})") from None
