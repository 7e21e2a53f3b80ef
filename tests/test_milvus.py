"""Vectors in Milvus, its embedded edition: hits equal those of the local store, and follow the index."""

from pathlib import Path

import numpy as np
import pytest

import search as program
from retrieval import stores
from retrieval.indexing import update_index
from retrieval.search import LocalStore, Searcher
from retrieval.stores import MilvusStore, open_store
from tests.test_index import blip, new_index, picture, some_pictures, weights  # noqa: F401

pytest.importorskip("pymilvus", reason="pip install -r requirements-milvus.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-milvus.txt")


def test_hits_equal_the_local_ones_and_follow_the_index(tmp_path: Path, blip, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stores, "BATCH", 2)
    root = some_pictures(tmp_path / "pictures", 9)
    index = new_index(tmp_path / "index", root, store=f"milvus:{tmp_path / 'v.db'}")
    queries = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for step in range(3):
        update_index(index, blip)
        store = MilvusStore(index)
        store.synchronise()
        local = LocalStore(index, [entry for _, entry in index.numbered()])
        for k in (1, 4, 50):
            for found, expected in zip(store.nearest(queries, k), local.nearest(queries, k), strict=True):
                assert [number for number, _ in found] == [number for number, _ in expected], (step, k)
                assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        store.client.close()
        (root / f"{step}.png").unlink()  # gone, changed, added
        picture(100 + step).save(root / f"{step + 4}.png")
        picture(200 + step).save(root / f"new{step}.png")


def test_the_program_searches_there_and_reranks_here(tmp_path: Path, weights, capsys):  # noqa: F811
    root = some_pictures(tmp_path / "pictures", 5)
    args = ["index", str(weights), str(root), str(tmp_path / "i"), "--device", "cpu"]
    assert program.main([*args, "--store", f"milvus:{tmp_path / 'v.db'}"]) == 0
    capsys.readouterr()
    assert program.main(["query", str(tmp_path / "i"), "a red dog", "--rerank", "3", "--top", "5"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "re-ranked by matching" in printed and printed.count(".png") == 8


@pytest.mark.parametrize("store", ["milvus:", "elsewhere:x", "milvus"])
def test_stores_that_cannot_be_are_explained(tmp_path: Path, blip, store):  # noqa: F811
    index = new_index(tmp_path / "index", tmp_path, store=store)
    with pytest.raises(ValueError, match="write milvus:FILE.db or milvus:http"):
        open_store(index)
    index.head.store = ""
    assert open_store(index) is None and Searcher(index, blip).vectors.nearest(np.zeros((1, 32), np.float32), 3) == [[]]
