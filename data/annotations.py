"""Annotation files to one table of images and captions, for every data set and split, checked row by row.

Sources: BLIP's Karpathy files of COCO and Flickr30k (Li et al., ICML 2022), training rows {"caption", "image",
"image_id"}, evaluation rows {"image", "caption": [...]}. A caption is right for an image exactly if their ids are
equal. N images, M captions.
"""

import http.client
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from configs.schema import RetrievalConfig
from data.rows import Row, read_rows
from data.scenes import ensure_scenes, one_process_at_a_time
from transform.text import MAX_WORDS, clean_caption
from utils import find_path

logger = logging.getLogger(__name__)

URL = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
FILES = {  # data set: file name for a split, and whether it can be fetched from URL
    "coco": ("coco_karpathy_{}.json", True),
    "flickr": ("flickr30k_{}.json", True),
    "emoji": ("{}.json", False),
    "scenes": ("{}.json", False),
}
SPLITS = ("train", "val", "test")
SPLIT_SEED = 0  # not the run's seed: a run and its later evaluation must agree on what is the test set
SPLIT_SHARE, SPLIT_LEAST, SPLIT_MOST = 0.1, 2, 5000  # of a custom train file, for each missing split; in image ids


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


def load_annotations(cfg: RetrievalConfig, split: str, seed: int = SPLIT_SEED) -> Annotations:
    """The annotations of `split` (train, val or test) of the config's data set, drawn or downloaded if need be.

    `seed` decides what `scenes` draws and what is split off a custom file; it is not the run's seed.
    Raises ValueError that names the file, the row and what to do.
    """
    assert split in SPLITS, split
    name = f"{cfg.dataset} {split}"
    if cfg.dataset == "custom":
        file, rows = _custom_rows(cfg, split, seed)
        return build_annotations(name, file, rows)
    if cfg.dataset not in FILES:
        raise ValueError(f"dataset {cfg.dataset!r} is unknown: set dataset to one of {', '.join([*FILES, 'custom'])}")
    root = find_path(cfg.ann_root)
    if cfg.dataset == "scenes":
        ensure_scenes(root, seed)
    pattern, online = FILES[cfg.dataset]
    file = root / pattern.format(split)
    if online:
        download(URL + file.name, file)
    return build_annotations(name, file, read_rows(file))


def available_splits(cfg: RetrievalConfig) -> list[str]:
    """The splits that the config has annotations for: all, but for custom files without a train_file."""
    if cfg.dataset != "custom" or cfg.train_file:
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


def _custom_rows(cfg: RetrievalConfig, split: str, seed: int) -> tuple[Path, list[Row]]:
    """File and rows of one split of the user's own files; a split without a file is cut off the training file."""
    names = {which: getattr(cfg, f"{which}_file") for which in SPLITS}
    absent = [which for which in ("test", "val") if not names[which]]
    source = split if names[split] else "train"
    if not names[source]:
        either = "no train_file" if split == "train" else f"neither a {split}_file nor a train_file to split"
        raise ValueError(f"dataset is custom, but there is {either}: set one in the config")
    file = find_path(find_path(cfg.ann_root) / names[source])
    rows = read_rows(file)
    if source != "train" or not absent:
        return file, rows
    parts = split_rows(file, rows, absent, seed)
    if split == absent[0]:  # said once, though each split is loaded by itself
        cut = ", ".join(f"{len({row.group for row in part})} {which}" for which, part in parts.items())
        lacking = " and ".join(absent)
        logger.info("%s: split by image with seed %d, for want of a file for %s: %s", file, seed, lacking, cut)
    return file, parts[split]


def split_rows(file: Path, rows: list[Row], absent: list[str], seed: int) -> dict[str, list[Row]]:
    """Rows of `train` and of each split in `absent`, cut by image id at random, so that no image is in two."""
    groups = list(dict.fromkeys(row.group for row in rows))
    size = min(SPLIT_MOST, max(SPLIT_LEAST, round(SPLIT_SHARE * len(groups))))
    if len(groups) < (len(absent) + 1) * SPLIT_LEAST:
        keys = " and ".join(f"{which}_file" for which in absent)
        raise ValueError(
            f"{file} has {len(groups)} different images, too few to split {' and '.join(absent)} off: "
            f"set {keys} in the config, or add images"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    place = {}
    for position, group in enumerate(order):
        place[groups[group]] = absent[position // size] if position < size * len(absent) else "train"
    parts: dict[str, list[Row]] = {"train": [], **{which: [] for which in absent}}
    for row in rows:
        parts[place[row.group]].append(row)
    return parts


# ---------------------------------------------------------------- download


def download(url: str, file: Path) -> None:
    """Fetch `url` into `file` unless it is there; of several processes one fetches, and nothing half-written stays."""
    if file.exists():
        return
    temporary = None
    try:
        with one_process_at_a_time(file):
            if file.exists():  # another process was faster
                return
            logger.info("downloading %s", url)
            with urlopen(url, timeout=60) as answer:
                file.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
                temporary = Path(name)
                with open(handle, "wb") as output:
                    shutil.copyfileobj(answer, output)
                expected = answer.headers.get("Content-Length")
            _check_download(temporary, expected)
            temporary.chmod(0o644)  # temporary files are made for their owner's eyes only
            os.replace(temporary, file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(
            f"{file} is not there and could not be downloaded from {url} ({error}): fetch that address on a machine "
            f"with network and put the file at {file}, or set ann_root to the folder that has it"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _check_download(file: Path, expected: str | None) -> None:
    """Raise ValueError for a transfer that stopped early, or for a log-in page in place of the file."""
    size = file.stat().st_size
    if expected is not None and size != int(expected):
        raise ValueError(f"the transfer stopped after {size} of {expected} bytes")
    with open(file, "rb") as start:
        if not start.read(64).lstrip().startswith(b"["):
            raise ValueError("the answer is not a JSON list but something else, perhaps a log-in page")
