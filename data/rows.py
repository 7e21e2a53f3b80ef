"""Annotation files to checked rows: image, captions, and perhaps image_id and split.

Every message names the file, the row (counted from 1; in JSON Lines it is the line) and the key.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.dialects import METADATA, read_dialect, read_folder, read_text
from data.keys import did_you_mean, same_file
from data.samples import read_samples
from data.shards import Shards, is_shards, shard_files

SPLIT_NAMES = {  # what files call a split, in lower case
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class Row(NamedTuple):
    """One checked row: `number` counts from 1 (the line in JSON Lines; a table's header does not count)."""

    file: Path
    number: int
    image: str  # path below image_root, spelt as `same_file` does; '' = captions without a picture
    captions: list[str]  # none: a picture without captions
    image_id: str | None = None
    split: str | None = None  # train, val or test
    sentids: list[int] = []  # COCO's id of each caption, where the file has them

    @property
    def place(self) -> str:
        """Where the row stands, for a message."""
        return place(self.file, self.number, self.image)

    @property
    def group(self) -> tuple:
        """What makes images one: the image_id within its file or, without one, the path."""
        if self.image_id is not None:
            return "id", self.file, self.image_id
        return ("path", self.image) if self.image else ("row", self.file, self.number)


class RowFile(NamedTuple):
    """The rows of one annotation file, and what the user should know about how it was read."""

    rows: list[Row]
    notes: list[str]


def read_rows(file: Path, image_root: Path = Path(), fetched: Shards | None = None) -> RowFile:
    """The checked rows of a file, folder or set of shards in any known dialect; ValueError names file, row and key.

    `image_root`: what paths found in a folder are relative to; the shards that those of annotations are among, which
    are `fetched` if they are not on the disk.
    """
    inside = [file / name for name in METADATA if (file / name).is_file()]
    if inside:
        file = inside[0]
    if is_shards(file):
        found = read_samples(file, image_root, fetched)
    else:
        found = read_folder(file, image_root) if file.is_dir() else read_dialect(file, read_text(file))
    rows = [_check_row(file, number, row) for number, row in found.rows]
    if not rows:
        raise ValueError(f"{file} has no rows: it needs at least one, with the keys image and caption")
    without = next((row for row in rows if row.split is None), None)
    if without and any(row.split for row in rows):
        raise ValueError(f"{without.place} has no 'split', other rows have one: give every row its split")
    return RowFile(rows, found.notes)


def place(file: Path, number: int, image: object) -> str:
    """'train.json, row 3'; of shards, whose rows nobody has numbered, 'train-{0..9}.tar, sample train-3.tar/17.jpg'."""
    return f"{file}, sample {image}" if is_shards(file) else f"{file}, row {number}"


def row_files(path: Path) -> Iterator[Path]:
    """The files that a file, a folder or a set of shards with annotations consists of, in a fixed order."""
    if is_shards(path):
        yield from shard_files(path).paths
        return
    inside = [path / name for name in METADATA if (path / name).is_file()]
    if not path.is_dir() or inside:
        yield inside[0] if inside else path
        return
    yield from sorted(below for below in path.rglob("*.txt") if below.is_file())


def _check_row(file: Path, number: int, row: Any) -> Row:
    """A row whose keys and types are right, with a path that stays under image_root."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{place(file, number, row.get('image') if isinstance(row, dict) else '')} {what}")

    if not isinstance(row, dict):
        raise wrong(f"is {_kind(row)}, not an object with the keys image and caption")
    for key in ("image", "caption"):
        if key not in row:
            raise wrong(f"has no key {key!r}{did_you_mean(key, row)}, only {', '.join(map(str, row)) or 'nothing'}")
    image, captions, image_id, split = row["image"], row["caption"], row.get("image_id"), row.get("split")
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise wrong(f"needs under 'image' a path relative to image_root, not {_kind(image)}")
    if image and (image[0] in "/\\~" or image[1:2] == ":" or ".." in image.replace("\\", "/").split("/")):
        raise wrong(f"needs under 'image' a path inside image_root, not absolute and without '..', not {image[:80]!r}")
    if image and ("\0" in image or "://" in image):
        raise wrong(f"needs under 'image' a path inside image_root, not an address: download it; not {image[:80]!r}")
    captions = [] if captions is None else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise wrong(f"needs under 'caption' a text or a list of texts, not {_kind(row['caption'])}")
    if not image and not captions:
        raise wrong("has neither an image nor a caption: remove it")
    if isinstance(image_id, str) and not image_id.strip():
        image_id = None  # as an empty cell of a table
    if image_id is not None and (isinstance(image_id, bool) or not isinstance(image_id, int | str)):
        raise wrong(f"needs under 'image_id' a text or a whole number, not {_kind(image_id)}")
    if split is not None and (not isinstance(split, str) or split.strip().lower() not in SPLIT_NAMES):
        raise wrong(f"has the split {split!r}{did_you_mean(str(split), SPLIT_NAMES)}: use {', '.join(SPLIT_NAMES)}")
    sentids = row.get("sentids") or []
    if sentids and not (isinstance(sentids, list) and len(sentids) == len(captions) and all(map(_is_id, sentids))):
        raise wrong("needs under 'sentids' a list of whole numbers, one for each caption")
    return Row(
        file, number, same_file(image) if image else "", captions,
        None if image_id is None else str(image_id), SPLIT_NAMES[split.strip().lower()] if split else None,
        sentids,
    )  # fmt: skip


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
