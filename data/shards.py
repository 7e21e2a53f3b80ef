"""A set of shards as one folder of pictures: members are found by name and read by their offset.

A set is a `.tar`, a folder of `.tar`, or `name-{000..099}.tar`. A member's name is its path in the shard, or that path
behind the shard's name: `00007.tar/000070012.jpg`. M members that are no text, of all shards.
"""

import logging
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.findings import cores
from data.tars import COMPRESSED, ShardError, TarIndex, hash_of, open_index, read_at, refuse_compressed, shard_state
from utils import Progress, find_path

logger = logging.getLogger(__name__)

PACKED = re.compile(r"\.(tar\.\w+|t[gbxz]z2?|tzst)$", re.IGNORECASE)  # names of compressed tars
FETCHES = 3  # of a shard that goes again before it is opened
OPEN_FILES = 64  # shards that a process keeps open
PICTURE = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)


class ShardFiles(NamedTuple):
    """The shards of a set in order: names relative to the folder that they share, and paths."""

    names: list[str]
    paths: list[Path]


def is_shards(root: Path) -> bool:
    """Whether this names shards; a folder does if it holds tars and neither folders nor pictures."""
    if not root.is_dir():
        return root.name.lower().endswith(".tar") or bool(PACKED.search(root.name))
    found = False
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if PICTURE.search(entry.name) or entry.is_dir():
                return False
            found = found or entry.name.lower().endswith(".tar") or bool(PACKED.search(entry.name))
    return found


def shard_files(root: Path) -> ShardFiles:
    """The shards that a set consists of; ShardError when a pattern cannot be read or a tar is compressed."""
    if root.is_dir():
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
        for name in names:
            if PACKED.search(name):
                _refuse_packed(root / name)
        names = [name for name in names if name.lower().endswith(".tar")]
        return ShardFiles(names, [root / name for name in names])
    pattern = os.fspath(root).replace(os.sep, "/")
    folder = pattern.partition("{")[0].rpartition("/")[0]
    found = expand(pattern)
    for path in found:
        if PACKED.search(path):
            _refuse_packed(find_path(path))
    return ShardFiles([path.removeprefix(folder).lstrip("/") for path in found], [find_path(path) for path in found])


def _refuse_packed(path: Path) -> None:
    shard_state(path)
    with open(path, "rb") as file:
        refuse_compressed(path, file.read(8))
    kinds = ", ".join(COMPRESSED.values())
    raise ShardError(f"{path} has the name of a compressed .tar, but is not one of {kinds}: call a plain tar .tar")


def expand(pattern: str) -> list[str]:
    """`name-{000..099}.tar` as a shell expands it; several braces, `{a,b}`, and braces in braces are possible."""
    start, depth, commas = pattern.find("{"), 0, []
    if start < 0:
        if "}" in pattern:
            raise ShardError(f"{pattern}: a brace without its partner: write name-{{000..099}}.tar")
        return [pattern]
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 1 and pattern[end] == ",":
            commas.append(end)
        if depth == 0:
            break
    else:
        raise ShardError(f"{pattern}: a brace without its partner: write name-{{000..099}}.tar")
    if commas:
        cuts = [start, *commas, end]
        parts = [part for one, other in pairwise(cuts) for part in expand(pattern[one + 1 : other])]
    else:
        parts = _range(pattern, pattern[start + 1 : end])
    rest = expand(pattern[end + 1 :])
    return [pattern[:start] + part + tail for part in parts for tail in rest]


def _range(pattern: str, text: str) -> list[str]:
    """'008..011' -> 008, 009, 010, 011."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not span or int(span[1]) > int(span[2]):
        raise ShardError(f"{pattern}: {{{text}}} is no range of shards: write {{000..099}}, or {{a,b,c}}")
    width = max(map(len, span.groups())) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
    return [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]


def open_shards(root: Path) -> "Shards":
    """The shards of a set, each with its index; the same object as long as no shard changes."""
    files = shard_files(root)
    if not files.paths:
        raise ShardError(f"{root} holds no .tar")
    states = [shard_state(path) for path in files.paths]
    stamps = tuple((os.fspath(path), s.st_size, s.st_mtime_ns) for path, s in zip(files.paths, states, strict=True))
    return _open(root, tuple(files.names), stamps)


@lru_cache(maxsize=4)
def _open(root: Path, names: tuple[str, ...], stamps: tuple[tuple[str, int, int], ...]) -> "Shards":
    progress, indexes, unwritten = Progress("index of shards", len(names), "shards"), dict[Path, TarIndex](), {}
    paths = [Path(path) for path, _, _ in stamps]
    # The processes of a machine begin in different places, so that each finds what the others have made.
    first = len(paths) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(min(8, cores())) as pool:
        for index, problem in pool.map(open_index, paths[first:] + paths[:first]):
            indexes[index.path] = index
            if problem:
                unwritten[index.path] = problem
            progress.add(1)
    if unwritten:
        path, problem = next(iter(unwritten.items()))
        logger.info(
            "%s: the index of %d shards cannot be written beside them (%s: %s), so it is kept in memory and made again "
            "by each run", root, len(unwritten), path.parent, problem,
        )  # fmt: skip
    return Shards(root, list(names), [indexes[path] for path in paths])


class _Handle:
    """A shard that is open for reading as long as somebody refers to it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Shards:
    """Members by name. Reading is a call of its own (`pread`), so that forks and threads may share open files."""

    def __init__(
        self, root: Path, names: list[str], indexes: list[TarIndex], fetch: Callable[[int], None] | None = None
    ) -> None:
        """`fetch` brings a shard that is not there."""
        self.root, self.names, self.indexes, self.fetch = root, names, indexes, fetch
        self.number = {name: i for i, name in enumerate(names)}
        self.starts = [0, *accumulate(len(index.names) for index in indexes)]  # first member of each shard
        hashes = np.concatenate([index.hashes for index in indexes])  # (M,)
        self.order = np.argsort(hashes, kind="stable")  # (M,) members by the hash of their names
        self.hashes = hashes[self.order]
        self.handles: dict[int, _Handle] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": {}}

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> tuple[int, int] | None:
        """Shard and member of a name, None if there is none; ShardError when several shards have that member."""
        head, tar, member = name.partition(".tar/")
        shard = self.number.get(f"{head}.tar") if tar else None
        found = [] if shard is None else [place for place in self._members(member) if place[0] == shard]
        found = found or self._members(name)
        if len(found) > 1:
            first, second = (self.names[shard] for shard, _ in found[:2])
            raise ShardError(
                f"{name} is in {len(found)} shards of {self.root}, {first} and {second} among them: name its shard as "
                f"well, as in {first}/{name}"
            )
        return found[0] if found else None

    def _members(self, name: str) -> list[tuple[int, int]]:
        key, found, hashes = hash_of(name), [], self.hashes.data  # bisect is faster than numpy for one value
        place = bisect_left(hashes, key)
        while place < len(hashes) and hashes[place] == key:
            member = int(self.order[place])
            shard = bisect_right(self.starts, member) - 1
            if self.indexes[shard].names[member - self.starts[shard]] == name:
                found.append((shard, member - self.starts[shard]))
            place += 1
        return found

    def size(self, name: str) -> int:
        """Bytes of a member; KeyError if there is none."""
        shard, member = self._find(name)
        return int(self.indexes[shard].sizes[member])

    def read(self, name: str) -> bytes:
        """The bytes of a member; KeyError if there is none, ShardError when its shard is gone, changed or cut."""
        shard, member = self._find(name)
        index = self.indexes[shard]
        offset, size = int(index.offsets[member]), int(index.sizes[member])
        where = f"{name}, at byte {offset}, cannot be read"
        try:
            handle = self._handle(shard)
            state = os.fstat(handle.number)
            if (state.st_size, state.st_mtime_ns) != (index.size, index.mtime_ns):
                raise ShardError(
                    f"{index.path} has changed since it was indexed ({index.size} bytes then, {state.st_size} now), so "
                    f"{where}: put the shard back as it was; a new run makes a new index"
                )
            return read_at(handle.number, index.path, name, offset, size)
        except FileNotFoundError:
            raise ShardError(f"{index.path} is gone, so {where}: put the shard back") from None

    def listing(self) -> Iterator[tuple[str, int, int]]:
        """Name, with its shard's where there are several, size and the shard's time of each member."""
        for shard, index in zip(self.names, self.indexes, strict=True):
            for name, size in zip(index.names, index.sizes.tolist(), strict=True):
                yield f"{shard}/{name}" if len(self.names) > 1 else name, size, index.mtime_ns

    def _find(self, name: str) -> tuple[int, int]:
        place = self.find(name)
        if place is None:
            raise KeyError(name)
        return place

    def shard_of(self, name: str) -> int:
        """The number of the shard that a member is in; KeyError if there is none."""
        number = self.number.get(f"{name.partition('.tar/')[0]}.tar")
        return self._find(name)[0] if number is None else number

    def _fetched(self, shard: int) -> _Handle:
        """A shard that may have to be fetched first, and is not kept open: its room is free once it is deleted."""
        assert self.fetch is not None
        for _ in range(FETCHES):
            try:
                return _Handle(self.indexes[shard].path)
            except FileNotFoundError:  # also one that another process has just deleted
                self.fetch(shard)
        return _Handle(self.indexes[shard].path)

    def _handle(self, shard: int) -> _Handle:
        if self.fetch:
            return self._fetched(shard)
        handle = self.handles.get(shard)
        if handle is None:
            handle = _Handle(self.indexes[shard].path)
            for oldest in list(self.handles)[: max(0, len(self.handles) + 1 - OPEN_FILES)]:
                self.handles.pop(oldest, None)  # closed when the last reader lets go of it
            self.handles[shard] = handle
        return handle
