"""The index of pictures: equal to a fresh one after any changes, after a kill at any write, for any launch."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import weakref
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import search as program
from benchmarks import bench_search
from configs.schema import load_config
from data.annotations import load_annotations
from data.images import ImageStore, open_store
from models import load
from retrieval import features, indexing, threshold
from retrieval import index as index_module
from retrieval import search as search_module
from retrieval.index import Head, IndexFolder
from retrieval.indexing import update_index
from retrieval.search import LocalStore, Searcher, TokenCache
from retrieval.threshold import best_threshold, calibrate, kept_threshold
from tests.conftest import make_tiny_run, tiny_med, tiny_model
from tests.test_pictures import save_run_folder
from tests.test_rankings import tear
from tests.test_train import ROOT, run
from utils import Stopped


def picture(seed: int, size: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size + 4, 3), np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.manual_seed(3)
    torch.save({"model": tiny_model(med_config=tiny_med(), image_size=32).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def blip(weights):
    return load(weights)


def new_index(folder: Path, root: Path, **more) -> IndexFolder:
    return IndexFolder.create(folder, Head("w.pth", "", str(root), 32, (5, 96), **more))


def contents(index: IndexFolder) -> dict[bytes, tuple]:
    """Path: size, time, whether there is an error, and the vector (which differs in its last digits with the batch)."""
    found = {}
    for path, entry in index.entries().items():
        vector = [] if entry.part is None else np.asarray(index.vectors(entry.part)[entry.row]).tolist()
        found[path] = (entry.size, entry.mtime_ns, bool(entry.error), pytest.approx(vector, abs=1e-4))
    return found


def fresh(tmp_path: Path, root: Path, blip, name: str = "fresh") -> dict[bytes, tuple]:
    """The contents of a new index, in plain values."""
    index = new_index(tmp_path / name, root)
    update_index(index, blip)
    return {path: (*values[:3], values[3].expected) for path, values in contents(index).items()}


def some_pictures(root: Path, count: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(root / f"{i}.png")
    return root


def change_something(root: Path, rng: random.Random, step: int) -> None:
    """Add, edit, move, copy, delete, break or touch a picture."""
    files = sorted(path for path in root.rglob("*.png"))
    kind = rng.choice(["add", "add", "edit", "move", "copy", "delete", "break", "touch"])
    path = rng.choice(files)
    (root / "sub").mkdir(exist_ok=True)
    if kind == "add" or len(files) < 3:
        picture(1000 + step).save(root / f"new {step}.png")
    elif kind == "edit":
        picture(2000 + step).save(path)
    elif kind == "move":
        path.rename(root / "sub" / f"moved{step}.png")
    elif kind == "copy":
        shutil.copy(path, root / f"copy{step}.png")
    elif kind == "delete":
        path.unlink()
    elif kind == "break":
        path.write_bytes(b"broken %d" % step)
    else:
        os.utime(path, ns=(step, step))


@pytest.mark.parametrize("seed", range(3))
def test_after_any_series_of_changes_it_equals_a_fresh_one(tmp_path, blip, seed):
    root, rng = some_pictures(tmp_path / "pictures"), random.Random(seed)
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    for step in range(12):
        for _ in range(rng.randint(1, 3)):
            change_something(root, rng, 10 * step + rng.randint(0, 9))
        plan = update_index(index, blip, verify=rng.random() < 0.2)
        assert contents(index) == fresh(tmp_path, root, blip, f"fresh{step}"), (step, plan)
    plan = update_index(index, blip)
    assert not plan.encode and not plan.remove and not plan.put
    assert not list((tmp_path / "index").glob("*.jsonl"))


def test_what_moves_or_is_copied_is_not_encoded_again(tmp_path, blip, monkeypatch):
    root = some_pictures(tmp_path / "pictures")
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    monkeypatch.setattr(type(blip), "encode", lambda *_: pytest.fail("nothing is to be encoded"))
    (root / "0.png").rename(root / "moved.png")
    shutil.copy(root / "1.png", root / "copy.png")
    os.utime(root / "2.png", ns=(5, 5))
    plan = update_index(index, blip)
    assert (plan.moved, plan.unchanged, plan.remove, plan.encode) == (2, 5, [b"0.png"], [])
    entries = index.entries()
    assert entries[b"copy.png"][4:6] == entries[b"1.png"][4:6] and entries[b"2.png"].mtime_ns == 5


def test_copies_within_one_run_are_encoded_once_and_equal_sizes_and_times_are_trusted(tmp_path, blip):
    root = some_pictures(tmp_path / "pictures", 2)
    shutil.copy(root / "0.png", root / "same.png")
    index = new_index(tmp_path / "index", root)
    assert [len(same) for same in update_index(index, blip).encode] == [2, 1]
    before, stat = index.entries()[b"1.png"], (root / "1.png").stat()
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:-1] + b"x")  # as long, and as old
    os.utime(root / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert update_index(index, blip).unchanged == 3 and index.entries()[b"1.png"] == before
    assert len(update_index(index, blip, verify=True).encode) == 1


def test_broken_pictures_are_recorded_and_tried_again_when_they_change(tmp_path, blip):
    root = some_pictures(tmp_path / "pictures", 2)
    (root / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    assert "bad.jpg" in str(index.entries()[b"bad.jpg"].error)
    assert not update_index(index, blip).encode
    picture(7).save(root / "bad.jpg")
    assert len(update_index(index, blip).encode) == 1 and index.entries()[b"bad.jpg"].error is None


def test_what_was_unreadable_for_a_while_is_tried_again(tmp_path, blip, monkeypatch):
    """A file that could not be opened at each update, a picture that could not be decoded under `verify`."""
    root = some_pictures(tmp_path / "pictures", 3)
    index, open_file = new_index(tmp_path / "index", root), ImageStore.open_file

    def failing(self, name):
        if name == "1.png":
            raise OSError(5, "Input/output error")
        return open_file(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "open_file", failing)
        for _ in range(2):
            update_index(index, blip)
            assert "Input/output error" in str(index.entries()[b"1.png"].error)
    assert len(update_index(index, blip).encode) == 1
    expected = fresh(tmp_path, root, blip)
    assert contents(index) == expected
    index.change([index.entries()[b"2.png"]._replace(part=None, row=None, error="no decoder")])
    assert not update_index(index, blip).encode
    assert len(update_index(index, blip, verify=True).encode) == 1
    assert contents(index) == expected


def test_a_signal_is_heeded_while_files_are_read(tmp_path, blip, monkeypatch):
    root, read = tmp_path / "pictures", []
    root.mkdir()
    for i in range(600):
        (root / f"{i}.png").write_bytes(b"%d" % i)

    def slow(store, path):
        read.append(path)
        time.sleep(0.02)
        return path, ""

    def poll():
        raise Stopped("SIGTERM")

    monkeypatch.setattr(indexing, "digest_of", slow)
    index = new_index(tmp_path / "index", root)
    with pytest.raises(Stopped):
        update_index(index, blip, poll=poll)
    assert 0 < len(read) < 400 and not index.entries()


def test_a_root_that_is_empty_or_gone_is_refused(tmp_path, blip):
    root = some_pictures(tmp_path / "pictures", 2)
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    before = index.entries()
    shutil.move(root, tmp_path / "elsewhere")
    for use in (update_index, Searcher):
        with pytest.raises(ValueError, match="mount its disk or, if it has moved, write .* root in .*index.json"):
            use(index, blip)
    root.mkdir()
    with pytest.raises(ValueError, match="no pictures there .*Is the disk mounted"):
        update_index(index, blip)
    assert index.entries() == before
    head = tmp_path / "index" / "index.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"root": str(tmp_path / "elsewhere")}))
    moved = IndexFolder(tmp_path / "index")
    plan = update_index(moved, blip)
    assert plan.unchanged == 2 and not plan.encode and moved.entries() == before


def test_a_folder_that_cannot_be_read_any_more_is_refused(tmp_path, blip, monkeypatch, caplog):
    """Its pictures are not gone. The error is made here, as root may read every folder."""
    root = some_pictures(tmp_path / "pictures", 2)
    some_pictures(root / "locked", 1)
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    before, scandir = index.entries(), os.scandir

    def refusing(path):
        if os.fsencode(path).endswith(b"locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (root / "0.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        with pytest.raises(ValueError, match="pictures/locked: this folder cannot be read .Permission denied., and "):
            update_index(index, blip)
        assert index.entries() == before and b"locked/0.png" in before
        fresh = new_index(tmp_path / "fresh", root)  # none of its pictures were known, as in a disk's lost+found
        update_index(fresh, blip)
        assert set(fresh.entries()) == {b"1.png"} and "locked: this folder cannot be read" in caplog.text


NAMES = [b"a b.png", b"new\nline.png", "emoji \U0001f415.png".encode(), b"latin \xe4.png", b"UPPER.PNG", b"sub/x.png"]


def test_odd_names_and_orientation(tmp_path, blip):
    root = os.fsencode(tmp_path / "pictures")
    os.makedirs(root + b"/sub")
    for number, name in enumerate(NAMES):
        with open(root + b"/" + name, "wb") as file:
            picture(number).save(file, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(99).save(tmp_path / "pictures" / "turned.png", exif=exif)
    index = new_index(tmp_path / "index", tmp_path / "pictures")
    update_index(index, blip)
    assert set(index.entries()) == {*NAMES, b"turned.png"} and not any(e.error for e in index.entries().values())
    searcher = Searcher(index, blip)
    hits = searcher.image(picture(99).transpose(Image.Transpose.ROTATE_270), 1)
    assert hits[0].path == "turned.png" and hits[0].cosine == pytest.approx(1, abs=1e-4)
    assert os.fsencode(searcher.image(picture(3), 1)[0].path) == NAMES[3]


def test_the_picture_of_a_query_is_opened_as_those_of_the_index(tmp_path, blip):
    root, exif = some_pictures(tmp_path / "pictures", 3), Image.Exif()
    exif[0x0112] = 6
    picture(99).save(root / "turned.png", exif=exif)
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    searcher = Searcher(index, blip)
    (hit,) = searcher.image(root / "turned.png", 1)
    assert hit.path == "turned.png" and hit.cosine == pytest.approx(1, abs=1e-4)
    texts = ["a dog", "a cat on a table"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    lines = program.rank_texts(searcher, Namespace(image=root / "turned.png", texts=tmp_path / "texts.txt",
                                                   top=2, rerank=2))  # fmt: skip
    expected = blip.similarity(searcher.store.load("turned.png"), texts)[0].tolist()
    cosines = [float(found[1]) for line in lines if (found := re.search(r"cosine (-?[.0-9]+)", line))]
    assert sorted(cosines) == pytest.approx(sorted(expected), abs=6e-4)
    with pytest.raises(ValueError, match="w.pth cannot be read"):
        searcher.image(tmp_path / "w.pth", 1)


def test_texts_for_a_picture_come_by_matching_then_by_contrast(indexed, tmp_path, blip):
    """--rerank says how many are matched, 0 is contrast alone."""
    path, texts = indexed / "pictures" / "2.png", ["a dog", "a cat on a table", "red", "two women running", "a ball"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    cosine, score = blip.similarity(path, texts)[0], blip.score(path, texts)[0]
    near = cosine.argsort(descending=True).tolist()
    searcher = Searcher(IndexFolder(indexed / "index"), blip)
    for rerank, top in ((0, 4), (2, 4), (3, 2), (9, 9)):
        args = Namespace(image=path, texts=tmp_path / "texts.txt", top=top, rerank=rerank)
        lines = program.rank_texts(searcher, args)
        order = sorted(near[:rerank], key=lambda i: -float(score[i])) + near[rerank:]
        assert [line.rpartition("  ")[2] for line in lines] == [texts[i] for i in order[:top]]
        assert [line for line in lines if "P(match)" in line] == lines[:rerank]


def test_an_archive_equals_a_folder(tmp_path, blip):
    root = some_pictures(tmp_path / "pictures")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for path in root.iterdir():
            file.write(path, path.name)
        file.writestr("notes.txt", "no picture")
    index = new_index(tmp_path / "index", tmp_path / "p.zip")
    update_index(index, blip)
    vectors = {path: values[3] for path, values in contents(index).items()}
    assert vectors == {path: values[3] for path, values in fresh(tmp_path, root, blip).items()}


def test_members_of_an_archive_that_cannot_be_read_are_recorded(tmp_path, blip):
    archive = tmp_path / "p.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(some_pictures(tmp_path / "pictures", 4).iterdir()):
            file.write(path, path.name)
    tear(archive, "1.png")
    data = bytearray(archive.read_bytes())
    for name, at, value in ((b"2.png", 8, 1), (b"3.png", 10, 97)):  # encrypted; of an unknown compression
        data[data.rindex(name) - 46 + at] = value  # in the central directory
    archive.write_bytes(data)
    index = new_index(tmp_path / "index", archive)
    for _ in range(2):
        update_index(index, blip)
        errors = {entry.name: entry.error or "" for entry in index.entries().values()}
        assert errors.pop("0.png") == "" and list(errors) == ["1.png", "2.png", "3.png"]
        for error, said in zip(errors.values(), ("while decompressing", "encrypted", "not supported"), strict=True):
            assert said in error


def test_a_kill_at_any_write_loses_no_more_than_that_write(tmp_path, weights):
    """In a process of its own: one that has run threads cannot be forked safely."""
    some_pictures(tmp_path / "pictures", 5)
    code = f"from tests.test_index import kill_at_every_write as k; k({str(tmp_path)!r}, {str(weights)!r})"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) >= 8, done.stderr[-3000:]
    # vectors and journal of three batches, two steps of the merge at least


def kill_at_every_write(folder: str, weights: str) -> None:
    """A child dies in the n-th write, for every n; the next run goes on, and the index is a fresh one."""
    tmp_path, blip = Path(folder), load(weights)
    root = tmp_path / "pictures"
    expected = fresh(tmp_path, root, blip)
    indexing.BATCH = 2
    n = 0
    while True:
        folder_n = tmp_path / f"index{n}"
        new_index(folder_n, root).close()
        pid = os.fork()
        if pid == 0:
            die_in_write(n)
            update_index(IndexFolder(folder_n), blip)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        index = IndexFolder(folder_n)
        done = {*index.entries(), *(e.path for j in folder_n.glob("*.jsonl") for e in index_module.read_journal(j))}
        plan = update_index(index, blip)
        assert sum(map(len, plan.encode)) == 5 - len(done)
        assert contents(index) == expected and not list(folder_n.glob("*.jsonl"))
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 77
        n += 1
    print(n)


def die_in_write(n: int) -> None:
    """In this process the n-th write stops in its middle: half of the data, or all of it without its consequence."""
    count = 0

    def next_dies() -> bool:
        nonlocal count
        count += 1
        return count > n

    write, note, change, unlink = (
        index_module._write, index_module.PartWriter.note, index_module.IndexFolder.change, Path.unlink,
    )  # fmt: skip

    def half_write(file, data):
        if next_dies():
            file.write(data[: len(data) // 2 + 1])
            file.flush()
            os._exit(77)
        write(file, data)

    def half_note(self, entries):
        entries = list(entries)
        if next_dies():
            text = "".join(map(index_module.as_line, entries))
            self.journal.write(text[: len(text) // 2])
            self.journal.flush()
            os._exit(77)
        note(self, entries)

    def no_change(self, *args, **kwargs):
        if next_dies():
            os._exit(77)
        change(self, *args, **kwargs)

    def no_unlink(self, *args, **kwargs):
        if self.suffix == ".jsonl" and next_dies():
            os._exit(77)
        unlink(self, *args, **kwargs)

    index_module._write, index_module.PartWriter.note = half_write, half_note
    index_module.IndexFolder.change, Path.unlink = no_change, no_unlink


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, blip, weights):
    root = some_pictures(tmp_path / "pictures", 9)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "search.py",
        "index",
    ]
    args = [str(weights), str(root), str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run([*command, *args], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    two = IndexFolder(tmp_path / "two")
    assert contents(two) == fresh(tmp_path, root, blip)
    assert len({entry.part for entry in two.entries().values()}) == 2


# ---- searching ------------------------------------------------------------------------------------------------------


def planted(tmp_path: Path, vectors: np.ndarray, blip) -> tuple[IndexFolder, LocalStore]:
    """An index of given vectors, in three parts, in mixed order."""
    index = new_index(tmp_path / "planted", tmp_path)
    rng = np.random.default_rng(0)
    for chosen in np.array_split(rng.permutation(len(vectors)), 3):
        writer = index_module.PartWriter(index.folder)
        entries = [[index_module.Entry(b"%06d.png" % i, 1, 1, b"d%d" % i)] for i in chosen]
        writer.append(torch.from_numpy(vectors[chosen]), None, entries)
        writer.close()
    index.merge_journals()
    return index, LocalStore(index, [entry for _, entry in index.numbered()])


@pytest.mark.parametrize("ties", [False, True])
def test_nearest_is_a_sort_of_everything_in_float64(tmp_path, blip, ties):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((500, 32)).astype(np.float32)
    if ties:
        vectors = vectors[rng.integers(0, 40, 500)]  # many equal ones
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index, store = planted(tmp_path, vectors, blip)
    order = [int(entry.name[:6]) for _, entry in index.numbered()]
    queries = rng.standard_normal((20, 32)).astype(np.float32)
    for k in (1, 10, 500, 900):
        for query, found in zip(queries, store.nearest(queries, k), strict=True):
            exact = vectors[order].astype(np.float64) @ query.astype(np.float64)
            expected = sorted(range(500), key=lambda i: (-exact[i], i))[:k]  # noqa: B023
            assert [number for number, _ in found] == expected
            assert [score for _, score in found] == pytest.approx(exact[expected].tolist())


@pytest.mark.parametrize("keep", [False, True])
def test_reranked_scores_are_those_of_evaluation(tmp_path, blip, keep):
    root = some_pictures(tmp_path / "pictures", 7)
    index = new_index(tmp_path / "index", root, keep_tokens=keep)
    update_index(index, blip)
    searcher = Searcher(index, blip)
    (answer,) = searcher.texts(["A red dog!"], top=7, rerank=5)
    paths = [str(root / hit.path) for hit in answer.contrast]
    expected, match = blip.score(paths, "a red dog")[:, 0], blip.match(paths, "a red dog")[:, 0]
    tolerance = 0.05 if keep else 1e-4  # kept tokens are bfloat16
    assert len(answer.reranked) == 5 and len(answer.contrast) == 7
    for hit in answer.reranked:
        assert hit.rank_itc is not None and hit.rank_itc <= 5
        assert hit.score == pytest.approx(float(expected[hit.rank_itc - 1]), abs=tolerance)
        assert hit.match == pytest.approx(float(match[hit.rank_itc - 1]), abs=tolerance)
    scores = [hit.score for hit in answer.reranked]
    assert scores == sorted(scores, reverse=True) and [hit.rank for hit in answer.reranked] == [1, 2, 3, 4, 5]
    index.head.threshold = max(hit.match for hit in answer.reranked) + 1e-6
    assert searcher.texts(["a red dog"], 3, 5)[0].matches is False
    assert searcher.texts(["a red dog"], 3)[0].matches is None


def test_a_picture_that_is_gone_since_is_left_out_of_reranking_and_said(tmp_path, blip, caplog, monkeypatch):
    root = some_pictures(tmp_path / "pictures", 4)
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    (root / "1.png").unlink()
    searcher = Searcher(index, blip)
    monkeypatch.setattr(search_module, "SCORES", 8)  # two queries at once
    answers = searcher.texts(["a dog", "a cat", "a bus"], top=4, rerank=4)
    assert [len(answer.contrast) for answer in answers] == [4, 4, 4]
    assert [{hit.path for hit in answer.reranked} for answer in answers] == [{"0.png", "2.png", "3.png"}] * 3
    assert "image 1.png is missing" in caplog.text and "update the index" in caplog.text
    for path in root.iterdir():
        path.unlink()
    answer = Searcher(index, blip).texts(["a dog"], top=4, rerank=4)[0]
    assert answer.reranked == [] and answer.matches is None


def test_the_cache_is_bounded():
    cache = TokenCache(most=250)
    for number in range(5):
        cache.put(number, torch.zeros(25))  # 100 bytes
    assert list(cache.tokens) == [3, 4] and cache.held == 200
    assert cache.get(3) is not None and cache.get(0) is None
    cache.put(5, torch.zeros(25))
    assert list(cache.tokens) == [3, 5]


def test_the_best_threshold_tells_the_cases_apart():
    found = best_threshold(np.array([0.9, 0.8, 0.7, 0.2]), np.array([0.1, 0.3, 0.75, 0.25]))
    assert (found.threshold, found.found, found.nothing) == (0.7, 0.75, 0.75)
    rng = np.random.default_rng(0)
    with_own, without = rng.random(50), rng.random(50) * 0.8
    found = best_threshold(with_own, without)
    both = [np.mean(with_own >= t) + np.mean(without < t) for t in np.concatenate([with_own, without])]
    assert found.found + found.nothing == pytest.approx(max(both))


def test_calibration_holds_few_pictures_and_finds_what_all_at_once_give(tiny_run, monkeypatch):
    folder = save_run_folder(tiny_run)
    blip, cfg = load(folder), load_config(folder / "config.yaml")
    table, store = load_annotations(cfg, "val", blip.model.tokenizer), open_store(cfg)
    pictures = [store.load(name) for name in table.images]
    cosine, match = blip.similarity(pictures, table.captions).numpy(), blip.match(pictures, table.captions).numpy()
    with_own, without = [], []
    for caption, own in enumerate(table.caption_image):
        best = np.argsort(-cosine[:, caption])[:2]
        with_own.append(match[best, caption].max())
        without.append(match[best[best != own], caption].max(initial=0))

    loaded, held, original = [], [], ImageStore.load

    def counting(self, name):
        image = original(self, name)
        loaded.append(weakref.ref(image))
        held.append(sum(picture() is not None for picture in loaded))
        return image

    monkeypatch.setattr(features, "CHUNK", 2)
    monkeypatch.setattr(threshold, "SHORTLIST", 2)
    monkeypatch.setattr(ImageStore, "load", counting)
    expected = best_threshold(np.array(with_own), np.array(without))
    assert calibrate(blip, folder) == pytest.approx(tuple(expected), rel=1e-5)
    assert len(pictures) == 4 and max(held) == 2


# ---- program --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, weights) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    some_pictures(folder / "pictures", 8)
    args = ["index", str(weights), str(folder / "pictures"), str(folder / "index"), "--device", "cpu"]
    assert program.main(args) == 0
    return folder


def test_folders_and_pictures_whose_names_are_no_text(tmp_path, weights, capsysbinary):
    """They are printed with their odd bytes written out; also as the reason why a picture cannot be read."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin \xe4"))
    some_pictures(root, 2)
    for name in (b"broken \xe4.png", b"dangling \xe4.png"):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        if name.startswith(b"broken"):
            path.write_bytes(b"nothing")
        else:
            path.symlink_to(tmp_path / "nowhere")
    index = str(root / "index")
    assert program.main(["index", str(weights), str(root), index, "--device", "cpu"]) == 0
    assert program.main(["status", index]) == 0
    printed = capsysbinary.readouterr().out.decode()
    assert printed.count("2 pictures of") == 2 and "latin \\udce4" in printed
    assert "2 pictures cannot be read" in printed and "ing \\udce4.png" in printed
    assert program.main(["query", index, "--image", str(root / "1.png")]) == 0
    assert program.main(["export", index, str(root / "v.npy")]) == 0
    printed = capsysbinary.readouterr().out.decode()
    assert "like " in printed and printed.count("latin \\udce4") == 2


def test_index_query_status_and_export(indexed, capsys, tmp_path):
    index = str(indexed / "index")
    assert program.main(["query", index, "a red dog", "--top", "3", "--rerank", "4", "--json"]) in (0, 1)
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["contrast"]) == len(answer["reranked"]) == 3 and answer["threshold"] == 0.5
    status = program.main(["query", index, "a red dog", "--top", "3", "--rerank", "4"])
    printed = capsys.readouterr().out
    assert ("nothing matches" in printed) == (status == 1) == (answer["matches"] is False)
    assert printed.index("by contrast") < printed.index("re-ranked by matching")
    for hit in answer["contrast"]:
        assert f"{hit['rank']:4}  cosine {hit['cosine']:.3f}  {hit['path']}" in printed
    (tmp_path / "q.txt").write_text("a dog\n\na cat on a table\n")
    assert program.main(["query", index, "--queries", str(tmp_path / "q.txt"), "--json", "--rerank", "0"]) == 0
    assert [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()] == ["a dog", "a cat on a table"]
    assert program.main(["query", index, "--image", str(indexed / "pictures" / "2.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contrast"][0]["path"] == "2.png"
    args = ["query", index, "--image", str(indexed / "pictures" / "2.png"), "--texts", str(tmp_path / "q.txt")]
    assert program.main(args) == 0 and "P(match)" in capsys.readouterr().out
    assert program.main(["status", index]) == 0
    assert "8 pictures of" in capsys.readouterr().out
    assert program.main(["export", index, str(tmp_path / "v.npy")]) == 0
    vectors, names = np.load(tmp_path / "v.npy"), (tmp_path / "v.txt").read_text().splitlines()
    assert vectors.shape == (8, 32) and names == [f"{i}.png" for i in range(8)]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert program.main(["export", index, str(tmp_path / "v.csv")]) == 2 and "ends in .npy" in capsys.readouterr().err


def test_status_tells_of_an_interrupted_run(indexed, tmp_path, capsys):
    shutil.copytree(indexed / "index", tmp_path / "index")
    writer = index_module.PartWriter(tmp_path / "index")
    writer.note([index_module.Entry(b"x.png", 1, 1, b"d", error="broken")])
    writer.close()
    assert program.main(["status", str(tmp_path / "index")]) == 0
    printed = capsys.readouterr().out
    assert "1 pictures of a run that is going on, or was interrupted" in printed and "wait for it, or run" in printed


HOLD = "import sys, time, filelock as f; k = f.FileLock(sys.argv[1]); k.acquire(); print(1, flush=True); time.sleep(99)"


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(indexed, tmp_path, capsys):
    folder = tmp_path / "index"
    shutil.copytree(indexed / "index", folder)
    writer = index_module.PartWriter(folder)  # of the command that holds the lock
    writer.note([index_module.Entry(b"x.png", 1, 1, b"d", error="broken")])
    command, args = [sys.executable, "-c", HOLD, str(folder / index_module.LOCK)], ["update", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "1\n"
            assert program.main(args) == 2
            assert f"{folder}: another process is writing this index: wait" in capsys.readouterr().err
            assert list(folder.glob("part_*.jsonl")) and b"x.png" not in IndexFolder(folder).entries()
        finally:
            holder.kill()
    writer.close()
    assert program.main(args) == 0 and "8 pictures of" in capsys.readouterr().out
    assert not list(folder.glob("part_*.jsonl"))


def test_every_process_of_a_launch_learns_that_another_one_writes(tmp_path, monkeypatch):
    index = new_index(tmp_path / "index", tmp_path)
    monkeypatch.setattr(indexing, "is_main", lambda: False)
    with indexing.only_writer(index):
        pass
    assert not (tmp_path / "index" / index_module.LOCK).exists()  # the first process alone takes it
    for reason in (ValueError("another process is writing"), Stopped("SIGTERM")):
        monkeypatch.setattr(indexing, "from_main", lambda value, reason=reason: [reason])
        with pytest.raises(type(reason), match=str(reason)), indexing.only_writer(index):
            pass


def test_other_weights_and_roots_are_refused(indexed, tmp_path, capsys):
    torch.manual_seed(9)
    torch.save({"model": tiny_model(med_config=tiny_med(), image_size=32).state_dict()}, tmp_path / "other.pth")
    args = ["index", str(tmp_path / "other.pth"), str(indexed / "pictures"), str(indexed / "index"), "--device", "cpu"]
    assert program.main(args) == 2
    error = capsys.readouterr().err
    assert "other.pth" in error and "w.pth" in error and "cannot be compared" in error
    some_pictures(tmp_path / "p", 1)
    assert program.main([args[0], str(tmp_path / "other.pth"), str(tmp_path / "p"), args[3], "--device", "cpu"]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert program.main(["status", str(tmp_path)]) == 2 and "there is no index" in capsys.readouterr().err
    assert program.main(["index", args[1], str(tmp_path / "none"), str(tmp_path / "i"), "--device", "cpu"]) == 2
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "i").exists()
    (tmp_path / "empty").mkdir()
    for source, more in (
        (tmp_path / "p" / "0.png", []),
        (tmp_path / "empty", []),
        (tmp_path / "p", ["--store", "foo"]),
    ):
        args = ["index", str(tmp_path / "other.pth"), str(source), str(tmp_path / "i"), "--device", "cpu", *more]
        assert program.main(args) == 2 and not (tmp_path / "i").exists()  # nothing is left to be in the way
    capsys.readouterr()
    args = ["index", str(indexed.parent / "x"), str(indexed / "pictures"), str(indexed / "index"), "--keep_tokens"]
    head = IndexFolder(indexed / "index").head
    assert program.main([args[0], head.checkpoint, *args[2:], "--device", "cpu"]) == 2
    assert "without --keep_tokens" in capsys.readouterr().err


def test_links_that_lead_nowhere_are_noted_and_pipes_left_alone(tmp_path, blip):
    root = some_pictures(tmp_path / "pictures", 2)
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "pipe.jpg")
    index = new_index(tmp_path / "index", root)
    update_index(index, blip)
    assert set(index.entries()) == {b"0.png", b"1.png", b"dangling.png"}
    assert index.entries()[b"dangling.png"].error


def test_an_index_is_found_from_another_folder_and_opened_as_it_was_made(tmp_path, weights, monkeypatch, capsys):
    some_pictures(tmp_path / "here" / "pictures", 3)
    shutil.copy(weights, tmp_path / "here" / "w.pth")
    monkeypatch.chdir(tmp_path / "here")
    assert program.main(["index", "w.pth", "pictures", "index", "--device", "cpu", "--precision", "bf16"]) == 0
    monkeypatch.chdir(tmp_path)
    head = IndexFolder(Path("here/index")).head
    assert head.precision == "bf16" and Path(head.checkpoint).is_absolute()
    assert program.main(["query", "here/index", "a dog", "--device", "cpu"]) in (0, 1)


@pytest.mark.parametrize("query", ["", "  ", "\udcff dog"])
def test_what_is_no_text_is_refused(indexed, query, capsys):
    assert program.main(["query", str(indexed / "index"), query, "--device", "cpu"]) == 2
    assert "is empty, or not text in UTF-8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_calibrated_threshold_goes_into_the_index(tmp_path, capsys):
    folder = make_tiny_run(tmp_path)
    assert run(folder, "--set", "max_epoch=1") == 0
    assert program.main(["calibrate", str(folder / "out"), "--device", "cpu"]) == 0
    values = json.loads((folder / "out" / "threshold.json").read_text())
    assert f"P(match) {values['threshold']:.3f}" in capsys.readouterr().out and values["captions"] == 8
    args = ["index", str(folder / "out"), str(folder / "images"), str(tmp_path / "index"), "--device", "cpu"]
    assert program.main(args) == 0
    assert IndexFolder(tmp_path / "index").head.threshold == values["threshold"]
    assert kept_threshold(str(folder / "out" / "checkpoint_best.pth"), values["weights_sha256"]) == values["threshold"]
    assert kept_threshold(str(folder / "out"), "other") is None


def test_the_benchmark_compares_what_finds_the_same():
    (count, *times) = bench_search.bench_vectors(3000, repeats=1)
    assert count == "3,000" and float(times[0]) > 0 and float(times[1]) > 0
    (line,) = bench_search.bench_model("nano", 32, images=3, rerank=2)
    assert "indexing" in line and "2 candidates re-ranked" in line
