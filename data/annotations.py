"""Annotation files to one table of images and captions, for every data set and split, checked row by row.

Sources: BLIP's Karpathy files of COCO and Flickr30k (Li et al., ICML 2022), training rows {"caption", "image",
"image_id"}, evaluation rows {"image", "caption": [...]}. A caption is right for an image exactly if their ids are
equal. N images, M captions.
"""

import csv
import http.client
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np

from data.images import find_path
from data.scenes import ensure_scenes, one_process_at_a_time
from transform.text import clean_caption

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

    @property
    def caption_ids(self) -> np.ndarray:
        """(M,) int64: the id of each caption's image."""
        return self.image_ids[self.caption_image]


def load_annotations(cfg: Any, split: str, seed: int = SPLIT_SEED) -> Annotations:
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


def build_annotations(name: str, file: Path, rows: list["Row"]) -> Annotations:
    """Rows to a table: rows of one image path become one image, rows of one image_id share their id."""
    images: dict[str, int] = {}
    first_row: list[Row] = []
    numbers: dict[tuple, int] = {}
    image_ids, captions, caption_image = [], [], []
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
            captions.append(cleaned)
            caption_image.append(index)
    ids, indices = np.array(image_ids, np.int64), np.array(caption_image, np.int64)
    return Annotations(name, file, list(images), ids, captions, indices)


# ---------------------------------------------------------------- files to rows


class Row(NamedTuple):
    """One checked row: `number` counts from 1 (the line in JSON Lines; a CSV header does not count)."""

    number: int
    image: str
    captions: list[str]
    image_id: str | None

    @property
    def group(self) -> tuple[str | None, str]:
        """What makes images one: the image_id or, without one, the path."""
        return (None, self.image) if self.image_id is None else ("id", self.image_id)


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON list, JSON Lines or CSV file, checked; ValueError names file, row and key."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"annotation file {file} cannot be read ({error.strerror}): set ann_root, or the file's key, in the config "
            "(relative paths are looked up from the working directory, then from the repository)"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    rows = [_check_row(file, number, row) for number, row in _parse(file, text)]
    if not rows:
        raise ValueError(f"{file} has no rows: it needs at least one, with the keys image and caption")
    return rows


def _parse(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows, unchecked, of whichever of the three formats the text is in."""
    start, header = text.lstrip()[:1], text.lstrip().partition("\n")[0]
    if file.suffix.lower() == ".csv" or (start not in "[{<" and {"image", "caption"} <= set(header.strip().split(","))):
        yield from _parse_csv(file, text)
    elif start == "<":
        raise ValueError(f"{file} is an HTML page, not annotations: a download got a web page instead; fetch it again")
    elif start == "[":
        yield from enumerate(_json(file, text, ""), 1)
    elif start == "{":
        lines = text.split("\n") if header.rstrip().endswith("}") else [text]
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        for number, line in numbered:
            row = _json(file, line, f", row {number}" if len(numbered) > 1 else "")
            if len(numbered) == 1 and "image" not in row:
                keys = ", ".join(list(row)[:5]) or "empty"
                raise ValueError(f"{file} is one object ({keys}), not a list of rows with the keys image and caption")
            yield number, row
    elif start:
        raise ValueError(f"{file} is neither a JSON list, nor JSON Lines, nor CSV with the columns image and caption")


def _json(file: Path, text: str, row: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{file}{row} is nested too deeply to be annotations") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if not row else f"column {error.colno}"
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        advice = "it ends too early, so fetch or write it again" if cut else "correct it there"
        raise ValueError(f"{file}{row} is not valid JSON ({error.msg} at {where}): {advice}") from None


def _parse_csv(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader, number = csv.DictReader(io.StringIO(text, newline=""), strict=True), 0
    lacking = [key for key in ("image", "caption") if key not in (reader.fieldnames or ())]
    if lacking and text.strip():
        raise ValueError(f"{file} has no column {lacking[0]!r}: its first line must name the columns image and caption")
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise ValueError(
                    f"{file}, row {number} has {'more' if None in row else 'fewer'} cells than the header names: "
                    "put a caption with commas into double quotes"
                )
            yield number, {key: value for key, value in row.items() if key != "image_id" or value}
    except csv.Error as error:
        raise ValueError(f"{file}, row {number + 1} is not valid CSV ({error})") from None


def _check_row(file: Path, number: int, row: Any) -> Row:
    """A row whose keys and types are right, with a path that stays under image_root."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}, row {number} {what}")

    if not isinstance(row, dict):
        raise wrong(f"is {_kind(row)}, not an object with the keys image and caption")
    for key in ("image", "caption"):
        if key not in row:
            raise wrong(f"has no key {key!r}, only {', '.join(map(str, row)) or 'nothing'}")
    image, captions, image_id = row["image"], row["caption"], row.get("image_id")
    if not isinstance(image, str) or not image.strip():
        raise wrong(f"needs under 'image' a path relative to image_root, not {_kind(image)}")
    if image[0] in "/\\~" or image[1:2] == ":" or ".." in image.replace("\\", "/").split("/") or "\0" in image:
        raise wrong(f"needs under 'image' a path inside image_root, not absolute and without '..', not {image[:80]!r}")
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise wrong(f"needs under 'caption' a text or a list of texts, not {_kind(row['caption'])}")
    if image_id is not None and (isinstance(image_id, bool) or not isinstance(image_id, int | str)):
        raise wrong(f"needs under 'image_id' a text or a whole number, not {_kind(image_id)}")
    return Row(number, image, captions, None if image_id is None else str(image_id))


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        strange = [item for item in value if not isinstance(item, str)]
        return f"a list with {_kind(strange[0])} in it" if strange else "an empty list" if not value else "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, dict):
        return "an object"
    return f"the value {json.dumps(value)}"


# ---------------------------------------------------------------- custom data sets


def _custom_rows(cfg: Any, split: str, seed: int) -> tuple[Path, list[Row]]:
    """File and rows of one split of the user's own files; a split without a file is cut off the training file."""
    names = {which: getattr(cfg, f"{which}_file") for which in SPLITS}
    absent = [which for which in ("test", "val") if not names[which]]
    source = split if names[split] else "train"
    if not names[source]:
        raise ValueError(f"dataset is custom, but there is neither a {split}_file nor a train_file to split: set one")
    file = find_path(find_path(cfg.ann_root) / names[source])
    rows = read_rows(file)
    if source != "train" or not absent:
        return file, rows
    return file, split_rows(file, rows, absent, seed)[split]


def split_rows(file: Path, rows: list[Row], absent: list[str], seed: int) -> dict[str, list[Row]]:
    """Rows of `train` and of each split in `absent`, cut by image id, so that no image is in two."""
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
    cut = ", ".join(f"{len({row.group for row in part})} {which}" for which, part in parts.items())
    logger.info("%s: split by image with seed %d, for want of a file for %s: %s", file, seed, " and ".join(absent), cut)
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
