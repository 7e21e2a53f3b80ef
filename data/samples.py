"""Annotations out of the shards themselves: `key.txt` or `key.json` beside `key.jpg`, as webdataset and img2dataset do.

A key is the path of a member up to the first dot of its last part.
"""

import json
import posixpath
from pathlib import Path
from typing import Any

from data.keys import KEY_OF, Dialect, Numbered, caption_lines, own_keys, plain
from data.shards import PICTURE, Shards, open_shards, shard_files
from data.tars import ShardError, TarIndex, shard_state


def read_samples(source: Path, image_root: Path, fetched: Shards | None = None) -> Dialect:
    """The samples of the shards `source`, which must be among those of `image_root`; ValueError names shard and key.

    Captions are the lines of `key.txt` or, without one, what the json says; all other keys come from the json.
    `fetched`: the shards of image_root where they are fetched; `source` then counts by its file names.
    """
    known = _known(image_root, fetched)
    paths = shard_files(source).paths
    rows: Numbered = []
    for path in paths:
        name, index = known.get(Path(path.name) if fetched else path.resolve(), ("", None))
        if index is None:
            shard_state(path)
            raise ShardError(
                f"{path} holds pictures, too, so it must be one of the shards of image_root {image_root}: set "
                "image_root to the folder of the shards, or to all of them"
            )
        rows += [(len(rows) + i, row) for i, row in enumerate(_samples(index, name), 1)]
    found = own_keys(source, rows)
    if not any(row["caption"] for _, row in found.rows):
        raise ShardError(f"{source}: no sample has a text (key.txt, or key.json with a caption) beside its picture")
    note = f"{source}: {len(rows)} pictures in {len(paths)} shards, each with the captions beside it"
    return Dialect(found.rows, [note, *found.notes])


def _known(image_root: Path, fetched: Shards | None) -> dict[Path, tuple[str, TarIndex]]:
    """The shards of image_root by their path, or by their file name: names and indexes."""
    try:
        shards = fetched or open_shards(image_root)
    except ShardError as error:
        raise ShardError(f"image_root {image_root}: {error}") from None
    return {
        Path(name) if fetched else index.path.resolve(): (name, index)
        for name, index in zip(shards.names, shards.indexes, strict=True)
    }


def _samples(index: TarIndex, shard: str) -> list[dict[str, Any]]:
    """A shard's rows, in the order of their paths."""
    contents = index.texts()
    pictures = _by_key(index.path, {name: key_of(name) for name in index.names if PICTURE.search(name)})
    members = _by_key(index.path, {name: key_of(name) + posixpath.splitext(name)[1] for name in contents})
    texts = {key: contents[name] for key, name in members.items()}
    lonely = next((name for name in texts if posixpath.splitext(name)[0] not in pictures), None)
    if lonely:
        raise ShardError(f"{index.path}: {lonely} has no picture of its key beside it: add it, or remove the text")
    rows = []
    for key, name in sorted(pictures.items(), key=lambda item: item[1].split("/")):
        row = _json(index.path, key, texts[f"{key}.json"]) if f"{key}.json" in texts else {}
        if f"{key}.txt" in texts:
            row["caption"] = caption_lines(texts[f"{key}.txt"])
        elif not any(KEY_OF.get(plain(word)) == "caption" for word in row):
            row["caption"] = []
        rows.append({**row, "image": f"{shard}/{name}"})
    return rows


def _by_key(path: Path, keys: dict[str, str]) -> dict[str, str]:
    """Members of the shard `path` by their `keys`; ShardError when two have the same."""
    members: dict[str, str] = {}
    for name, key in keys.items():
        other = members.setdefault(key, name)
        if other != name:
            raise ShardError(
                f"{path}: {other} and {name} share the key {key_of(name)}, the path up to the first dot: rename or "
                "remove one, or name the pictures in an annotation file"
            )
    return members


def key_of(name: str) -> str:
    """'a/b.left.jpg' -> 'a/b'."""
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.partition(".")[0])


def _json(path: Path, key: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ShardError(f"{path}: {key}.json is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ShardError(f"{path}: {key}.json is not an object with the sample's keys")
    return found
