"""Annotation files to one table of images and captions, for every data set and split; absent ones are fetched or drawn.

Sources: BLIP's Karpathy files of COCO and Flickr30k (Li et al., ICML 2022), training rows {"caption", "image",
"image_id"}, evaluation rows {"image", "caption": [...]}. A caption is right for an image exactly if their ids are
equal. N images, M captions.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints.download import fetch_to
from configs.datasets import ANNOTATIONS_URL, DATASETS, SPLITS
from configs.schema import RetrievalConfig
from data.rows import Row, read_rows
from data.scenes import ensure_scenes
from transform.text import MAX_WORDS, clean_caption
from utils import find_path

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # not the run's seed: a run and its later evaluation must agree on the test set
SPLIT_SHARE, SPLIT_LEAST, SPLIT_MOST = 0.1, 2, 5000  # image ids of a custom train_file that make up a missing split


@dataclass(frozen=True, eq=False)
class Annotations:
    """The images and captions of one split."""

    name: str
    file: Path
    images: list[str]  # unique paths relative to image_root, N
    image_ids: np.ndarray  # (N,) int64, numbered in order of first appearance, as BLIP does
    captions: list[str]  # cleaned, in the order of the file, M
    caption_image: np.ndarray  # (M,) int64, index into images
    cut: int = 0  # captions that lost the words after the first MAX_WORDS

    @property
    def caption_ids(self) -> np.ndarray:
        """(M,) int64: the id of each caption's image."""
        return self.image_ids[self.caption_image]


def load_annotations(cfg: RetrievalConfig, split: str) -> Annotations:
    """The annotations of `split` (train, val or test) of the config's data set, drawn or downloaded if need be.

    Raises ValueError that names the file, the row and what to do.
    """
    assert split in SPLITS, split
    name, info = f"{cfg.dataset} {split}", DATASETS[cfg.dataset]
    if not info.files:
        file, rows = _custom_rows(cfg, split)
        return build_annotations(name, file, rows)
    root = find_path(cfg.ann_root)
    if info.drawn:
        ensure_scenes(root)
    file = root / info.files.format(split)
    if info.online and not file.exists():
        _download(file, info.karpathy)
    return build_annotations(name, file, read_rows(file))


def available_splits(cfg: RetrievalConfig) -> list[str]:
    """The splits that the config has annotations for: all, unless it names its own files and no train_file."""
    if DATASETS[cfg.dataset].files or cfg.train_file:
        return list(SPLITS)
    return [split for split in SPLITS if getattr(cfg, f"{split}_file")]


def build_annotations(name: str, file: Path, rows: list[Row]) -> Annotations:
    """Rows to a table: rows of one image path become one image, rows of one image_id share their id."""
    images: dict[str, int] = {}
    first_row: list[Row] = []
    numbers: dict[tuple, int] = {}
    image_ids, captions, caption_image, cut = [], [], [], 0
    for row in rows:
        index = images.setdefault(row.image, len(images))
        if index == len(first_row):
            first_row.append(row)
            image_ids.append(numbers.setdefault(row.group, len(numbers)))
        elif first_row[index].group != row.group:
            raise ValueError(
                f"{file}, row {row.number}: image {row.image} has image_id {row.image_id!r} here and "
                f"{first_row[index].image_id!r} in row {first_row[index].number}: give an image one image_id"
            )
        for caption in row.captions:
            cleaned = clean_caption(caption)
            if not cleaned.strip():
                raise ValueError(
                    f"{file}, row {row.number}: the caption {caption[:80]!r} (key 'caption') is empty after cleaning: "
                    "give it words or remove it"
                )
            cut += cleaned.count(" ") == MAX_WORDS - 1 and cleaned != clean_caption(caption, MAX_WORDS + 1)
            captions.append(cleaned)
            caption_image.append(index)
    ids, indices = np.array(image_ids, np.int64), np.array(caption_image, np.int64)
    return Annotations(name, file, list(images), ids, captions, indices, cut)


# ---------------------------------------------------------------- custom data sets


def _custom_rows(cfg: RetrievalConfig, split: str) -> tuple[Path, list[Row]]:
    """File and rows of one split of the user's own files; a split without a file is cut off the training file."""
    names = {which: getattr(cfg, f"{which}_file") for which in SPLITS}
    absent = [which for which in ("test", "val") if not names[which]]
    source = split if names[split] else "train"
    if not names[source]:
        either = "no train_file" if split == "train" else f"neither a {split}_file nor a train_file to split"
        raise ValueError(f"dataset is {cfg.dataset}, but there is {either}: set one in the config")
    file = find_path(find_path(cfg.ann_root) / names[source])
    rows = read_rows(file)
    if source != "train" or not absent:
        return file, rows
    parts = split_rows(file, rows, absent)
    if split == absent[0]:  # said once, though each split is loaded by itself
        sizes = ", ".join(f"{len({row.group for row in part})} {which}" for which, part in parts.items())
        lacking = " or ".join(absent)
        logger.info("%s: split by image with seed %d, as there is no file for %s: %s", file, SPLIT_SEED, lacking, sizes)
    return file, parts[split]


def split_rows(file: Path, rows: list[Row], absent: list[str]) -> dict[str, list[Row]]:
    """Rows of `train` and of each split in `absent`, cut by image id at random, so that no image is in two."""
    groups = list(dict.fromkeys(row.group for row in rows))
    size = min(SPLIT_MOST, max(SPLIT_LEAST, round(SPLIT_SHARE * len(groups))))
    if len(groups) < (len(absent) + 1) * SPLIT_LEAST:
        keys = " and ".join(f"{which}_file" for which in absent)
        raise ValueError(
            f"{file} has {len(groups)} different images, too few to split {' and '.join(absent)} off: "
            f"set {keys} in the config, or add images"
        )
    shuffled = [groups[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(groups))]
    split_of = dict.fromkeys(groups, "train")
    for number, which in enumerate(absent):
        split_of |= dict.fromkeys(shuffled[number * size : (number + 1) * size], which)
    parts: dict[str, list[Row]] = {"train": [], **{which: [] for which in absent}}
    for row in rows:
        parts[split_of[row.group]].append(row)
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
