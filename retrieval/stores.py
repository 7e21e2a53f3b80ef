"""Where the vectors of an index are searched: here (`retrieval/search.py:LocalStore`), or in Milvus; and exports.

Milvus (Wang et al., SIGMOD 2021) keeps and searches vectors beyond one machine's memory. Its own client is used, with
its embedded edition for `milvus:FILE.db` and a server for `milvus:http://HOST:19530`. Re-ranking stays here.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.index import IndexFolder
from retrieval.search import VectorStore
from utils import Progress

BATCH = 2000  # vectors of one insertion


def open_store(index: IndexFolder) -> VectorStore | None:
    """The store that the index names; None = the local one."""
    if not index.head.store:
        return None
    return MilvusStore(index)


def synchronise(index: IndexFolder) -> None:
    """Make the store hold what the index holds."""
    if index.head.store:
        MilvusStore(index).synchronise()


def milvus_place(store: str) -> str:
    """Address, or absolute path, of milvus:...; ValueError for another kind of store."""
    kind, _, place = store.partition(":")
    if kind != "milvus" or not place:
        raise ValueError(f"store {store!r}: write milvus:FILE.db or milvus:http://HOST:19530")
    return place if "://" in place else str(Path(place).expanduser().resolve())


class MilvusStore:
    """Vectors of an index in a Milvus collection, by the numbers of its manifest."""

    def __init__(self, index: IndexFolder):
        place = milvus_place(index.head.store)
        try:
            from pymilvus import MilvusClient, MilvusException
        except ModuleNotFoundError:
            raise ValueError("the store milvus needs its client: pip install -r requirements-milvus.txt") from None
        for name in ("pymilvus", "milvus_lite", "faiss"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if "://" not in place:  # the embedded edition lacks a call that the client does without
            logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        self.index = index
        self.place = place
        self.collection = f"blip_{index.head.name}"
        try:
            self.client: Any = MilvusClient(self.place)
            if not self.client.has_collection(self.collection):
                width = index.head.embed_dim
                self.client.create_collection(
                    self.collection, dimension=width, metric_type="IP", id_type="int", consistency_level="Strong"
                )
            self.client.load_collection(self.collection)
        except MilvusException as error:
            raise ValueError(f"store {index.head.store}: Milvus answers: {error.message}") from None
        self.numbers = {number: place for place, (number, _) in enumerate(index.numbered())}  # id: place in the list

    def synchronise(self) -> None:
        """Insert what is new or changed, delete what is gone; the vector's place says whether it has changed."""
        wanted = {number: f"{entry.part}/{entry.row}" for number, entry in self.index.numbered()}
        there = dict(self._there())
        gone = [number for number in there if number not in wanted]
        for start in range(0, len(gone), BATCH):
            self.client.delete(self.collection, ids=gone[start : start + BATCH])
        new = [(number, entry) for number, entry in self.index.numbered() if there.get(number) != wanted[number]]
        progress = Progress("vectors into Milvus", len(new), "vectors")
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            rows = []
            for number, entry in part:
                assert entry.part is not None and entry.row is not None
                vector = np.asarray(self.index.vectors(entry.part)[entry.row])
                rows.append({"id": number, "vector": vector.tolist(), "place": wanted[number]})
            self.client.upsert(self.collection, rows)
            progress.add(len(part))

    def _there(self) -> Iterator[tuple[int, str]]:
        start, number = 0, "count(*)"
        while self.client.query(self.collection, filter=f"id >= {start}", output_fields=[number])[0][number]:
            part = f"id >= {start} and id < {start + BATCH}"
            rows = self.client.query(self.collection, filter=part, output_fields=["id", "place"], limit=BATCH)
            yield from ((int(row["id"]), str(row["place"])) for row in rows)
            start += BATCH

    def nearest(self, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """As `LocalStore.nearest`; how exact it is depends on the collection's kind of index."""
        if not len(self.numbers):
            return [[] for _ in queries]
        found = self.client.search(self.collection, data=queries.tolist(), limit=min(k, len(self.numbers)))
        return [
            [(self.numbers[int(hit["id"])], float(hit["distance"])) for hit in hits if int(hit["id"]) in self.numbers]
            for hits in found
        ]


# ---- export ---------------------------------------------------------------------------------------------------------


def export(index: IndexFolder, out: Path) -> Path:
    """Write all vectors (n, E) and paths: .npy (paths in a .txt beside it), .parquet or .faiss."""
    entries = [entry for _, entry in index.numbered()]
    vectors = np.empty((len(entries), index.head.embed_dim), np.float32)
    mapped = {part: index.vectors(part) for part in {entry.part for entry in entries} if part is not None}
    for row, entry in enumerate(entries):
        assert entry.part is not None
        vectors[row] = mapped[entry.part][entry.row]
    kind, part = out.suffix.lower(), out.with_name(f".{out.name}.part")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}.")
    try:
        if kind == ".npy":
            with open(part, "wb") as file:
                np.save(file, vectors)
        elif kind == ".parquet":
            _write_parquet(part, [entry.path for entry in entries], vectors)
        elif kind == ".faiss":
            _write_faiss(part, vectors)
        else:
            raise ValueError(f"{out}: export to a file whose name ends in .npy, .parquet or .faiss.")
        if kind != ".parquet":
            out.with_suffix(".txt").write_bytes(
                b"".join(entry.path.replace(b"\n", b"\\n") + b"\n" for entry in entries)
            )
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _write_parquet(path: Path, names: list[bytes], vectors: np.ndarray) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("exporting .parquet needs pyarrow: pip install pyarrow") from None
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
    texts = [name.decode("utf-8", "backslashreplace") for name in names]
    pyarrow.parquet.write_table(pyarrow.table({"path": texts, "vector": column}), path)


def _write_faiss(path: Path, vectors: np.ndarray) -> None:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ValueError("exporting .faiss needs faiss: pip install faiss-cpu") from None
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    faiss.write_index(flat, str(path))
