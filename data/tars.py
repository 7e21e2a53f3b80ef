"""One .tar of a data set: where its members lie and what its texts say, in an index that is written once beside it.

Sources: the layout of webdataset (https://github.com/webdataset/webdataset) and img2dataset. M members that are no
text, T texts.
"""

import logging
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

from data.keys import same_file
from data.texts import Texts

logger = logging.getLogger(__name__)

INDEX = ".index.npz"  # behind the shard's own name
VERSION = 1  # raise it when the index changes: indexes of before are made again
TEXT_KINDS = (".txt", ".json")
MAX_TEXT = 1 << 20  # bytes of one text
NAMES = ("names", "text_names")
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes


class ShardError(ValueError):
    """A shard is missing, damaged, cut short or changed; the message names shard, offset and sample."""


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The members of a shard as it was at `size` and `mtime_ns`."""

    path: Path
    size: int
    mtime_ns: int
    names: Texts  # paths spelt as `same_file` does, M
    offsets: np.ndarray  # (M,) int64, first byte of the content
    sizes: np.ndarray  # (M,) int64
    hashes: np.ndarray  # (M,) uint64, `hash_of` each name
    text_names: Texts  # T
    text_offsets: np.ndarray  # (T,)
    text_sizes: np.ndarray  # (T,)

    @property
    def file(self) -> Path:
        return self.path.with_name(self.path.name + INDEX)

    def texts(self) -> dict[str, str]:
        """The shard's texts by name; ShardError when one is not UTF-8."""
        stored = _read_index(self.path, ("contents",))
        if stored and (stored["size"], stored["mtime_ns"]) == (self.size, self.mtime_ns):
            contents = stored["contents"].tobytes()
            ends = np.cumsum(self.text_sizes)
            parts = [contents[end - size : end] for end, size in zip(ends, self.text_sizes, strict=True)]
        else:
            with open(self.path, "rb", buffering=0) as file:
                handle = file.fileno()
                places = zip(self.text_names, self.text_offsets.tolist(), self.text_sizes.tolist(), strict=True)
                parts = [read_at(handle, self.path, name, offset, size) for name, offset, size in places]
        found = {}
        for name, part, offset in zip(self.text_names, parts, self.text_offsets.tolist(), strict=True):
            try:
                found[name] = part.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ShardError(f"{self.path}: {name}, at byte {offset}, is not UTF-8 ({error.reason})") from None
        return found

    def digest(self) -> bytes:
        """What tells shards of other names, sizes or texts apart; it needs no picture to be read."""
        parts = (self.names, self.text_names)
        digest = sha256(b"".join(bytes(part.data) + bytes(part.bounds) for part in parts))
        digest.update(self.sizes.tobytes() + "\0".join(self.texts().values()).encode("utf-8", "surrogatepass"))
        return digest.digest()


def hash_of(name: str) -> int:
    """64 bits of a member's name."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def read_at(handle: int, path: Path, name: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a shard that is open as `handle`; ShardError if there are fewer."""
    parts: list[bytes] = []
    left = size
    while left and (part := os.pread(handle, left, offset + size - left)):
        parts.append(part)
        left -= len(part)
    if left:
        raise ShardError(
            f"{path} is cut short: of {name}, at byte {offset}, {left} of {size} bytes are missing: fetch the shard "
            "again"
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


# ---- the index ------------------------------------------------------------------------------------------------------


def open_index(path: Path) -> tuple[TarIndex, str]:
    """The index of a shard, made if there is none of the shard as it is, and why it could not be written, or ''."""
    state = shard_state(path)
    stored = _read_index(path)
    if stored and (stored["size"], stored["mtime_ns"]) == (state.st_size, state.st_mtime_ns):
        return _from_arrays(path, stored), ""
    arrays = scan(path)
    return _from_arrays(path, arrays), _write_index(path, arrays)


def known_index(path: Path) -> TarIndex | None:
    """The index beside a shard's name, whether or not the shard is there; None without one."""
    stored = _read_index(path)
    return _from_arrays(path, stored) if stored else None


def shard_state(path: Path) -> os.stat_result:
    """What the file system says of a shard; ShardError when there is no such file."""
    try:
        state = path.stat()
    except OSError as error:
        raise ShardError(f"{path}: the shard is not there ({error.strerror}): fetch it, or correct its name") from None
    if not stat.S_ISREG(state.st_mode):
        raise ShardError(f"{path} is not a file: a shard is a .tar")
    return state


def _from_arrays(path: Path, arrays: Mapping[str, Any]) -> TarIndex:
    names, texts = (Texts.of(arrays[key].tobytes(), arrays[f"{key}_bounds"].tobytes()) for key in NAMES)
    return TarIndex(
        path, int(arrays["size"]), int(arrays["mtime_ns"]),
        names, arrays["offsets"], arrays["sizes"], arrays["hashes"],
        texts, arrays["text_offsets"], arrays["text_sizes"],
    )  # fmt: skip


def _read_index(path: Path, keys: Sequence[str] = ()) -> dict[str, Any] | None:
    """Arrays of the index beside a shard, by default all but the texts; None if there is none that can be read."""
    try:
        with np.load(path.with_name(path.name + INDEX), allow_pickle=False) as file:
            if int(file["version"]) != VERSION:
                return None
            wanted = ("size", "mtime_ns", *keys) if keys else [key for key in file.files if key != "contents"]
            return {key: file[key] for key in wanted}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _write_index(path: Path, arrays: Mapping[str, Any]) -> str:
    """Write the index in one step; why that failed, or ''."""
    part = path.with_name(f".{path.name}{INDEX}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path.with_name(path.name + INDEX))
    except OSError as error:
        return error.strerror or str(error)
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # a folder that cannot be written to
            pass
    return ""


# ---- one pass over a shard ------------------------------------------------------------------------------------------


def scan(path: Path) -> dict[str, Any]:
    """The arrays of a shard's index, from its headers; ShardError for what is not a whole, plain .tar."""
    state, places = shard_state(path), dict[str, tuple[int, int]]()
    links, contents = dict[str, str](), dict[str, bytes]()
    with open(path, "rb") as file:
        refuse_compressed(path, os.pread(file.fileno(), 8, 0))
        for name, member in _members(path, file, state.st_size):
            if member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                links[name] = same_file(posixpath.join(folder, member.linkname))
                continue
            if member.issparse():
                raise ShardError(f"{path}: {name}, at byte {member.offset}, is sparse: pack it without --sparse")
            places[name] = member.offset_data, member.size
            if name.endswith(TEXT_KINDS):
                if member.size > MAX_TEXT:
                    raise ShardError(f"{path}: {name} has {member.size} bytes, a text {MAX_TEXT} at most: remove it")
                contents[name] = read_at(file.fileno(), path, name, member.offset_data, member.size)
    for name, target in links.items():  # equal files are packed once
        if target in places:
            places[name] = places[target]
            if name.endswith(TEXT_KINDS) and target in contents:
                contents[name] = contents[target]
    files, texts = [name for name in places if name not in contents], list(contents)
    arrays: dict[str, Any] = {"version": VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    for prefix, names in (("", files), ("text_", texts)):
        spelt, where = Texts(names), np.array([places[name] for name in names], np.int64).reshape(-1, 2)
        arrays[f"{prefix}names"] = _as_array(bytes(spelt.data))
        arrays[f"{prefix}names_bounds"] = np.array(spelt.bounds, np.int64)
        arrays[f"{prefix}offsets"], arrays[f"{prefix}sizes"] = where.T
    arrays["hashes"] = np.array([hash_of(name) for name in files], np.uint64)
    arrays["contents"] = _as_array(b"".join(contents.values()))
    return arrays


def _as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _members(path: Path, file: Any, size: int):
    """Names and headers of the files in a shard; ShardError when it does not end as a .tar ends."""
    last, offset = "its start", 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            name = same_file(member.name).lstrip("/")
            last, offset = name, member.offset
            if member.offset_data + (member.size if member.isreg() else 0) > size:
                raise tarfile.ReadError("unexpected end of data")
            if not member.isdir() and not posixpath.basename(name).startswith("._"):  # what macOS adds
                yield name, member
    except tarfile.TarError as error:
        if "unexpected end" not in str(error):
            raise ShardError(f"{path} is not a .tar, or damaged after {last} at byte {offset} ({error})") from None
        raise ShardError(
            f"{path} is cut short: it has {size} bytes and ends within {last}, at byte {offset}: fetch the shard again"
        ) from None
    end = os.pread(file.fileno(), BLOCK, tar.offset)
    if len(end) < BLOCK:
        raise ShardError(
            f"{path} is cut short: it ends at byte {size}, after {last}, without a tar's end mark: fetch it again"
        )
    if any(end):
        raise ShardError(f"{path} is damaged at byte {tar.offset}, after {last}: fetch the shard again")
    file.seek(tar.offset)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ShardError(
                f"{path} goes on after its end mark at byte {tar.offset}, after {last}: these are several .tar in one "
                "file: pack them as one, or keep them apart"
            )


def refuse_compressed(path: Path, start: bytes) -> None:
    """ShardError for a compressed tar, of which no member can be read without unpacking all before it."""
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise ShardError(
                f"{path} is compressed ({kind}): a member of it cannot be read without unpacking all that lies before "
                "it, so samples could not come in any order. Unpack it to a plain .tar (pictures are compressed anyway)"
            )
