"""The index of a folder or archive of pictures: vectors in append-only parts, and a manifest in SQLite.

A folder:  index.json       format, weights, root, sizes, EXIF rule, threshold
           part_*.f32       unit-length float32 vectors (n, E), only ever appended to
           part_*.bf16      image tokens of the same rows (n, T, V), if they are kept
           part_*.jsonl     what a process has done and the manifest does not know yet
           manifest.sqlite  one row a picture: path, size, mtime_ns, digest, part and row of its vector, or error
           writing.lock     held by the launch that writes the index, one at a time

Vectors are on the disk before their line of the journal, and that before its row of the manifest. So a process that is
killed anywhere leaves at most vectors that nobody names. Several processes each write a part and its journal; the first
one merges them into the manifest, at the end or, after a crash, at the beginning of the next run.

Shapes: E embedding width, T image tokens, V their width, n rows of a part.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images import ImageStore
from transform.rgb import PixelRule

FORMAT = 1
DEFAULT_THRESHOLD = 0.5  # P(match) below which nothing matches, where none was calibrated
HEAD, MANIFEST, LOCK = "index.json", "manifest.sqlite", "writing.lock"
SCHEMA = """CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL, size INTEGER NOT NULL,
 mtime_ns INTEGER NOT NULL, digest BLOB NOT NULL, part TEXT, row INTEGER, error TEXT)"""


@dataclass
class Head:
    """What index.json says."""

    checkpoint: str
    weights_sha256: str
    root: str  # folder, .zip or .tar of the pictures, absolute
    embed_dim: int
    tokens: tuple[int, int]  # T, V
    keep_tokens: bool = False
    upright: bool = True  # EXIF orientation is applied, unlike in evaluation
    threshold: float = DEFAULT_THRESHOLD  # P(match) below which nothing matches
    store: str = ""  # where vectors are searched: '' = here, or milvus:...
    precision: str = "fp32"  # and config: how the checkpoint was opened
    config: str = ""
    name: str = field(default_factory=lambda: secrets.token_hex(6))  # of this index, where several share a store
    format: int = FORMAT


class Entry(NamedTuple):
    """One picture of the manifest; without a part it could not be read, and `error` says why."""

    path: bytes  # relative to the root, as the system spells it
    size: int
    mtime_ns: int
    digest: bytes
    part: str | None = None
    row: int | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return os.fsdecode(self.path)


class IndexFolder:
    """An index on the disk; ValueError where there is none, or one of another format."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            values = json.loads((folder / HEAD).read_text(encoding="utf-8"))
            if values.get("format") != FORMAT:
                raise ValueError(f"{folder}: an index of format {values.get('format')}, not {FORMAT}: make it anew.")
            self.head = Head(**values | {"tokens": tuple(values["tokens"])})
        except FileNotFoundError:
            raise ValueError(f"{folder}: there is no index, it has no {HEAD}: make one with search.py index.") from None
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / HEAD}: damaged ({error}): make the index anew.") from None
        self.database = sqlite3.connect(folder / MANIFEST, timeout=60, check_same_thread=False)
        self.database.execute(SCHEMA)
        self.database.commit()

    @classmethod
    def create(cls, folder: Path, head: Head) -> "IndexFolder":
        """A new, empty index; index.json comes last, so that what has one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HEAD, asdict(head))
        return cls(folder)

    def close(self) -> None:
        self.database.close()

    def pictures(self, rule: PixelRule) -> ImageStore:
        """Its folder or archive of pictures, which become RGB by `rule`; ValueError where that is gone."""
        if not os.path.exists(self.head.root):
            raise ValueError(
                f"{self.head.root}, with the pictures of {self.folder}, is not there: mount its disk or, if it has "
                f"moved, write its new place under root in {self.folder / HEAD}."
            )
        return ImageStore(self.head.root, rule, upright=self.head.upright)

    # ---- manifest -------------------------------------------------------------------------------------------------

    def entries(self) -> dict[bytes, Entry]:
        """All pictures by path, in the order in which they came."""
        rows = self.database.execute("SELECT path, size, mtime_ns, digest, part, row, error FROM images ORDER BY id")
        return {row[0]: Entry(*row) for row in rows}

    def numbered(self) -> list[tuple[int, Entry]]:
        """Number and entry of the pictures that have a vector, by number."""
        query = (
            "SELECT id, path, size, mtime_ns, digest, part, row, error FROM images WHERE part IS NOT NULL ORDER BY id"
        )
        return [(row[0], Entry(*row[1:])) for row in self.database.execute(query)]

    def change(self, put: Iterable[Entry] = (), remove: Iterable[bytes] = ()) -> None:
        """Add or replace entries and remove paths, all of it or nothing. A picture keeps its number."""
        with self.database:
            self.database.executemany("DELETE FROM images WHERE path = ?", [(path,) for path in remove])
            self.database.executemany(
                "INSERT INTO images (path, size, mtime_ns, digest, part, row, error) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, "
                "digest = excluded.digest, part = excluded.part, row = excluded.row, error = excluded.error",
                list(put),
            )

    def merge_journals(self) -> int:
        """Take what processes have written into the manifest; how many pictures that were."""
        count = 0
        for journal in sorted(self.folder.glob("part_*.jsonl")):
            entries = list(read_journal(journal))
            self.change(entries)
            journal.unlink()
            count += len(entries)
        return count

    # ---- vectors --------------------------------------------------------------------------------------------------

    def vectors(self, part: str) -> np.ndarray:
        """(n, E) of a part, mapped from the disk."""
        path = self.folder / f"{part}.f32"
        rows = path.stat().st_size // (4 * self.head.embed_dim)
        if not rows:
            return np.empty((0, self.head.embed_dim), np.float32)
        return np.memmap(path, np.float32, "r", shape=(rows, self.head.embed_dim))

    def tokens(self, part: str, row: int) -> Tensor:
        """Kept image tokens (T, V), bfloat16."""
        shape = self.head.tokens
        size = 2 * shape[0] * shape[1]
        with open(self.folder / f"{part}.bf16", "rb") as file:
            file.seek(row * size)
            return torch.frombuffer(bytearray(file.read(size)), dtype=torch.bfloat16).view(shape)


class PartWriter:
    """One process's part: vectors, and tokens if they are kept, then the journal's lines; each on the disk in turn."""

    def __init__(self, folder: Path, keep_tokens: bool = False):
        self.name = f"part_{secrets.token_hex(6)}"
        self.vectors = open(folder / f"{self.name}.f32", "xb")
        self.tokens = open(folder / f"{self.name}.bf16", "xb") if keep_tokens else None
        self.journal = open(folder / f"{self.name}.jsonl", "x", encoding="utf-8")
        self.rows = 0

    def append(self, feat: Tensor, tokens: Tensor | None, entries: Sequence[Sequence[Entry]]) -> None:
        """Vectors (b, E), tokens (b, T, V), and for each row the pictures that have it."""
        if self.tokens is not None and tokens is not None:
            _write(self.tokens, tokens.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        _write(self.vectors, feat.numpy().astype(np.float32).tobytes())
        placed = [e._replace(part=self.name, row=self.rows + i) for i, same in enumerate(entries) for e in same]
        self.rows += len(feat)
        self.note(placed)

    def note(self, entries: Iterable[Entry]) -> None:
        """Lines of the journal: pictures with a vector, or an error."""
        self.journal.writelines(as_line(entry) for entry in entries)
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def close(self) -> None:
        for file in (self.vectors, self.tokens, self.journal):
            if file is not None:
                file.close()


def _write(file: Any, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def as_line(entry: Entry) -> str:
    values = entry._asdict() | {"path": entry.path.hex(), "digest": entry.digest.hex()}
    return json.dumps(values) + "\n"


def read_journal(path: Path) -> Iterator[Entry]:
    """The whole lines of a journal; a last one that a crash cut short is not there yet."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            values |= {key: bytes.fromhex(values[key]) for key in ("path", "digest")}
            yield Entry(**values)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a small file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
