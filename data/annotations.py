"""Annotation files to one table of images and captions, for every data set and split; absent ones are fetched or drawn.

Sources: BLIP's Karpathy files of COCO and Flickr30k (Li et al., ICML 2022), training rows {"caption", "image",
"image_id"}, evaluation rows {"image", "caption": [...]}. A caption is right for an image exactly if their ids are
equal. N images, M captions.
"""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoints.download import fetch_to
from configs.datasets import ANNOTATIONS_URL, DATASETS, SPLITS
from configs.schema import RetrievalConfig
from data.cache import open_cache
from data.rows import Row, RowFile, read_rows
from data.scenes import ensure_scenes
from data.shards import is_shards
from data.texts import Texts
from transform.text import CaptionTokenizer, blip_tokenizer
from utils import find_path

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # not the run's seed: a run and its later evaluation must agree on the test set
SPLIT_SHARE, SPLIT_LEAST, SPLIT_MOST = 0.1, 2, 5000  # image ids of a custom train_file that make up a missing split
NO_IMAGE = -1  # in caption_image and caption_ids: a caption that no picture belongs to
NO_SENTENCE = -1  # in sentids: a caption without an id


@dataclass(frozen=True, eq=False)
class Annotations:
    """The images and captions of one split.

    In val and test there may be distractors, candidates that no query asks for: images without captions, and captions
    without an image.
    """

    name: str
    files: list[Path]
    images: Sequence[str]  # unique paths relative to image_root, N
    image_ids: np.ndarray  # (N,) int64, numbered in order of first appearance, as BLIP does
    captions: Sequence[str]  # cleaned, in the order of the files, M
    caption_image: np.ndarray  # (M,) int64, index into images, or NO_IMAGE
    cut: int = 0  # captions that lost the words after the first `max_words`
    notes: list[str] = field(default_factory=list)  # how the files were read, what was left out
    id_names: Sequence[str] = ()  # the files' own image_id of each image, '' without one, N
    sentids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (M,) COCO's ids of captions; or none
    tokenizer: CaptionTokenizer = field(default_factory=blip_tokenizer)  # whose rules have cleaned the captions

    @property
    def caption_ids(self) -> np.ndarray:
        """(M,) int64: the id of each caption's image, or NO_IMAGE."""
        if not self.images:
            return np.full(len(self.captions), NO_IMAGE)
        return np.where(self.caption_image == NO_IMAGE, NO_IMAGE, self.image_ids[self.caption_image])

    @property
    def source(self) -> str:
        """The files, for a message."""
        return " + ".join(map(str, self.files))

    @property
    def distractors(self) -> tuple[int, int]:
        """How many images have no caption of their id, and how many captions no image."""
        return int((~np.isin(self.image_ids, self.caption_ids)).sum()), int((self.caption_image == NO_IMAGE).sum())


def load_annotations(cfg: RetrievalConfig, split: str, tokenizer: CaptionTokenizer | None = None) -> Annotations:
    """The annotations of `split` (train, val or test) of the config's data set, drawn or downloaded if need be.

    `tokenizer`: of the model that is to read the captions; None is BLIP's.
    Raises ValueError that names the file, the row and what to do.
    """
    assert split in SPLITS, split
    name, info = f"{cfg.dataset} {split}", DATASETS[cfg.dataset]
    if not info.files:
        rows, notes = _custom_rows(cfg, split)
    else:
        root = find_path(cfg.ann_root)
        if info.drawn:
            ensure_scenes(root)
        file = root / info.files.format(split)
        if info.online and not file.exists():
            _download(file, info.karpathy)
        rows, notes = read_rows(file)
        _require_split(file, rows, split)
    return build_annotations(name, rows, notes, split != "train", cfg.on_bad_sample == "skip", tokenizer)


def available_splits(cfg: RetrievalConfig) -> list[str]:
    """The splits that the config has annotations for: all, unless it names its own files and no train_file."""
    if DATASETS[cfg.dataset].files or cfg.train_file:
        return list(SPLITS)
    return [split for split in SPLITS if getattr(cfg, f"{split}_file")]


def build_annotations(
    name: str,
    rows: list[Row],
    notes: Sequence[str] = (),
    distractors: bool = False,
    skip: bool = False,
    tokenizer: CaptionTokenizer | None = None,
) -> Annotations:
    """Rows to a table: rows of one image path become one image, rows of one image_id share their id.

    `distractors`: images without captions, and captions without an image, are candidates; else they are rows without
    words, or without an image. `skip` leaves out rows without words, or an image, and counts them; else they are an
    error.
    """
    tokenizer = tokenizer or blip_tokenizer()
    images: dict[str, int] = {}
    first_row: list[Row] = []
    groups, numbers = _joined_groups(rows), dict[tuple, int]()
    stated: dict[tuple[Path, str], Row] = {}
    image_ids, captions, caption_image, sentids, cut = array("q"), Texts(), array("q"), array("q"), 0
    left_out: list[str] = []
    for row in rows:
        texts, empty = _clean(row, tokenizer)
        if wrong := _what_is_wrong(row, empty, distractors):
            if not skip:
                raise ValueError(f"{row.place}: {wrong}")
            left_out += [row.place.partition(", ")[2]] * (len(empty) or 1)
            if not distractors and not (row.image and texts):
                continue
        _require_one_id(stated.setdefault((row.file, row.image), row), row)
        index = images.setdefault(row.image, len(images)) if row.image else NO_IMAGE
        if index == len(first_row):
            first_row.append(row)
            image_ids.append(numbers.setdefault(groups.get(row.group, row.group), len(numbers)))
        for text, is_cut, sentid in texts:
            cut += is_cut
            captions.append(text)
            caption_image.append(index)
            sentids.append(sentid)
    notes = list(notes)
    if left_out:
        notes.append(
            f"{name}: {len(left_out)} captions without words, or without an image, are left out, the first in "
            f"{left_out[0]} (on_bad_sample skip)"
        )
    table = Annotations(
        name, list(dict.fromkeys(row.file for row in rows)), Texts(images), np.array(image_ids, np.int64), captions,
        np.array(caption_image, np.int64), cut, notes, Texts(row.image_id or "" for row in first_row),
        np.array(sentids, np.int64), tokenizer,
    )  # fmt: skip
    if not table.images or not captions or not (table.caption_image != NO_IMAGE).any():
        raise ValueError(f"{table.source}: no image has a caption, so there is nothing to find")
    if any(table.distractors):
        notes.append(
            "{}: {} images without captions and {} captions without an image are distractors: candidates, but no "
            "queries".format(name, *table.distractors)
        )
    return table


def _what_is_wrong(row: Row, empty: list[str], distractors: bool) -> str:
    """Why a row, or a part of it, cannot be used; '' if it can."""
    if empty:
        return f"the caption {empty[0][:80]!r} (key 'caption') is empty after cleaning: give it words or remove it"
    if distractors or (row.captions and row.image):
        return ""
    lacking = "caption" if not row.captions else "image"
    return f"the row has no {lacking}: give it one, remove it, or set on_bad_sample to skip"


def _require_one_id(before: Row, row: Row) -> None:
    """ValueError when two rows of one file give an image different ids."""
    if row.image and before.group != row.group:
        raise ValueError(
            f"{row.place}: image {row.image} has image_id {row.image_id!r} here and "
            f"{before.image_id!r} in row {before.number}: give an image one image_id"
        )


def _clean(row: Row, tokenizer: CaptionTokenizer) -> tuple[list[tuple[str, bool, int]], list[str]]:
    """A row's cleaned captions, each with whether words were cut and its id, and its captions without words."""
    texts, empty = [], []
    for caption, sentid in zip(row.captions, row.sentids or [NO_SENTENCE] * len(row.captions), strict=True):
        cleaned = tokenizer.clean(caption)
        if not cleaned.strip():
            empty.append(caption)
            continue
        most = tokenizer.max_words
        is_cut = cleaned.count(" ") == most - 1 and cleaned != tokenizer.clean(caption, most + 1)
        texts.append((cleaned, is_cut, sentid))
    return texts, empty


def _joined_groups(rows: list[Row]) -> dict[tuple, tuple]:
    """Where several files give an image different ids: each of its groups to the one that stands for all of them."""
    parent: dict[tuple, tuple] = {}
    if len({row.file for row in rows}) < 2:
        return parent

    def top(group: tuple) -> tuple:
        while group in parent:
            group = parent[group]
        return group

    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row.image, row)
        if row.image and other.file != row.file and top(other.group) != top(row.group):
            parent[top(row.group)] = top(other.group)
    return {group: top(group) for group in parent}


# ---------------------------------------------------------------- custom data sets


def _custom_rows(cfg: RetrievalConfig, split: str) -> RowFile:
    """The rows of one split of the user's own files.

    A split without a file is what the training files call so or, if they name no splits, cut off them.
    """
    names = {which: getattr(cfg, f"{which}_file") for which in SPLITS}
    source = split if names[split] else "train"
    if not names[source]:
        either = "no train_file" if split == "train" else f"neither a {split}_file nor a train_file to split"
        raise ValueError(f"dataset is {cfg.dataset}, but there is {either}: set one in the config")
    found = _read_set(cfg, names[source])
    where, inside = _sources(found.rows), {row.split for row in found.rows}
    for which in sorted(which for which in inside if which and which != split):
        if split == source == "train" and names[which] and names[which] != names["train"]:
            raise ValueError(
                f"{where} has rows of the split {which}, but there is a {which}_file as well: remove one of the two"
            )
    absent = [which for which in ("test", "val") if not names[which] and which not in inside]
    if inside != {None}:
        rows = [row for row in found.rows if row.split == split]
        if rows and not (split == "train" and absent):
            return RowFile(rows, found.notes)
        if source == split and not rows:
            raise _no_rows(where, inside, split)
        found = RowFile([row for row in found.rows if row.split == "train"], found.notes)
        if not found.rows:
            raise _no_rows(where, inside, split)
    elif source != "train" or not absent:
        return found
    parts = split_rows(found.rows, absent)
    if split == absent[0]:  # said once, though each split is loaded by itself
        sizes = ", ".join(f"{len({row.group for row in part})} {which}" for which, part in parts.items())
        lacking = " or ".join(absent)
        logger.info(
            "%s: split by image with seed %d, as there is no file for %s: %s", where, SPLIT_SEED, lacking, sizes
        )
    return RowFile(parts[split], found.notes)


def _read_set(cfg: RetrievalConfig, names: str | list[str]) -> RowFile:
    """The rows of one file, or of several that are one set."""
    rows: list[Row] = []
    notes: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        fetched = open_cache(cfg) if cfg.fetch else None
        file = find_path(find_path(cfg.ann_root) / name)
        if fetched and is_shards(file):
            file = fetched.folder / Path(name).name
        found = read_rows(file, find_path(cfg.image_root), fetched.shards if fetched else None)
        rows += found.rows
        notes += found.notes
    _require_splits_everywhere(rows)
    return RowFile(rows, notes)


def _require_splits_everywhere(rows: list[Row]) -> None:
    """ValueError when only some files of a set name splits: the rows of the others would be in none."""
    without = [row for row in rows if row.split is None]
    if 0 < len(without) < len(rows):
        others = _sources([row for row in rows if row.split is not None])
        raise ValueError(
            f"{_sources(without)} has no 'split', but {others}, of the same set, has one: give every row its split "
            "(train, val or test)"
        )


def _sources(rows: list[Row]) -> str:
    return " + ".join(map(str, dict.fromkeys(row.file for row in rows)))


def _require_split(file: Path, rows: list[Row], split: str) -> None:
    inside = {row.split for row in rows}
    if not inside <= {None, split}:
        raise _no_rows(str(file), inside, split)


def _no_rows(where: str, inside: set[str | None], split: str) -> ValueError:
    others = " and ".join(sorted(str(which) for which in inside - {split}))
    return ValueError(f"{where} is read for the split {split}, but its rows say {others}: name the right file")


def split_rows(rows: list[Row], absent: list[str]) -> dict[str, list[Row]]:
    """Rows of `train` and of each split in `absent`, cut by image id at random, so that no image is in two."""
    where, joined = _sources(rows), _joined_groups(rows)
    groups = list(dict.fromkeys(joined.get(row.group, row.group) for row in rows))
    size = min(SPLIT_MOST, max(SPLIT_LEAST, round(SPLIT_SHARE * len(groups))))
    if len(groups) < (len(absent) + 1) * SPLIT_LEAST:
        keys = " and ".join(f"{which}_file" for which in absent)
        raise ValueError(
            f"{where} has {len(groups)} different images, too few to split {' and '.join(absent)} off: "
            f"set {keys} in the config, or add images"
        )
    shuffled = [groups[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(groups))]
    split_of = dict.fromkeys(groups, "train")
    for number, which in enumerate(absent):
        split_of |= dict.fromkeys(shuffled[number * size : (number + 1) * size], which)
    parts: dict[str, list[Row]] = {"train": [], **{which: [] for which in absent}}
    for row in rows:
        parts[split_of[joined.get(row.group, row.group)]].append(row)
    return parts


# ---------------------------------------------------------------- download


def _download(file: Path, karpathy: str) -> None:
    """Fetch one of BLIP's annotation files; ValueError says how else to get it."""
    address, source = ANNOTATIONS_URL + file.name, f"dataset_{karpathy}.json"
    convert = f"make it out of Karpathy's {source} with `python -m data.prepare convert {source} {file.parent}`, "
    try:
        fetch_to(address, file, _require_json_list)
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{address}: ").rstrip(".")
        raise ValueError(
            f"{file} is missing and could not be downloaded from {address} ({reason}): fetch that address on a machine "
            f"with network and put the file at {file}, {convert if karpathy else ''}or set ann_root to the folder that "
            "has it"
        ) from error


def _require_json_list(file: Path) -> None:
    """Raise ValueError for what a network sends in place of the file."""
    with open(file, "rb") as start:
        if not start.read(64).lstrip().startswith(b"["):
            raise ValueError("the answer is not a JSON list but something else, perhaps a log-in page")
