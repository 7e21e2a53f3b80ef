"""Vectors in Milvus, its embedded edition: hits equal those of the local store, and follow the index."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import search as program
from retrieval import stores
from retrieval.indexing import update_index
from retrieval.search import LocalStore, Searcher
from retrieval.stores import MilvusStore, open_store
from tests.test_index import blip, new_index, picture, some_pictures, weights  # noqa: F401
from tests.test_train import ROOT

pymilvus = pytest.importorskip("pymilvus", reason="pip install -r requirements-milvus.txt")
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


def test_the_program_searches_there_and_reranks_here(tmp_path: Path, weights):  # noqa: F811
    """Each command in a process of its own: the embedded edition belongs to one at a time."""

    def search(*args: str) -> str:
        command = [sys.executable, "search.py", *args, "--device", "cpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.stdout

    root = some_pictures(tmp_path / "pictures", 5)
    search("index", str(weights), str(root), str(tmp_path / "i"), "--store", f"milvus:{tmp_path / 'v.db'}")
    printed = search("query", str(tmp_path / "i"), "a red dog", "--rerank", "3", "--top", "5")
    assert "re-ranked by matching" in printed and printed.count(".png") == 8
    picture(50).save(root / "new.png")
    search("update", str(tmp_path / "i"))
    assert search("query", str(tmp_path / "i"), "a red dog", "--rerank", "0").count(".png") == 6


def test_a_file_that_another_process_has_open_is_explained(tmp_path: Path, blip):  # noqa: F811
    index = new_index(tmp_path / "index", tmp_path, store=f"milvus:{tmp_path / 'v.db'}")
    place = str(tmp_path / "v.db")
    code = f"import time, milvus_lite.db as m; db = m.MilvusLite({place!r}); print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match="store milvus:.*v.db"):
            MilvusStore(index)
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("store", ["milvus:", "elsewhere:x", "milvus"])
def test_stores_that_cannot_be_are_explained(tmp_path: Path, blip, store):  # noqa: F811
    index = new_index(tmp_path / "index", tmp_path, store=store)
    with pytest.raises(ValueError, match="write milvus:FILE.db or milvus:http"):
        open_store(index)
    index.head.store = ""
    assert open_store(index) is None and Searcher(index, blip).vectors.nearest(np.zeros((1, 32), np.float32), 3) == [[]]


def test_a_store_that_does_not_answer_is_one_sentence(monkeypatch, capsys):
    def gone(args):
        raise pymilvus.MilvusException(message="the server is gone")

    monkeypatch.setattr(program, "status_command", gone)
    assert program.main(["status", "x"]) == 2
    assert "the server is gone" in capsys.readouterr().err
