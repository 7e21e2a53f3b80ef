"""Pictures and captions out of .tar shards: the samples of the unpacked folder, bit for bit; damage is named."""

import gc
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

import train_retrieval
from benchmarks.bench_shards import captions, work
from configs.schema import RetrievalConfig, load_config
from data import tars
from data.annotations import build_annotations, load_annotations
from data.images import ImageStore, missing_message
from data.loaders import GlobalBatchSampler, train_loader
from data.retrieval import RetrievalTrain
from data.rows import read_rows
from data.shards import Shards, expand, is_shards, open_shards
from data.tars import INDEX, ShardError, open_index
from data.texts import Texts
from retrieval.indexing import listing, make_plan
from retrieval.provenance import files_sha256
from tests.test_resume import assert_equal_outcomes, outcome, sabotaged, straight
from tests.test_train import lines, run

CPU = torch.device("cpu")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes | str], mode: str = "w", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack_folder(path: Path, folder: Path) -> Path:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return pack(path, {file.relative_to(folder).as_posix(): file.read_bytes() for file in files})


# ---------------------------------------------------------------- members


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = f"{'long' * 40}/{'name' * 30}.png"


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, kind):
    names = ["./a.png", "sub/b.png", "sub//c.png", "nai\u0308ve.png"] + [LONG] * (kind != "ustar")
    asked_for = ["a.png", "sub/b.png", "sub/c.png", "na\u00efve.png", LONG]
    members = {name: png(i) for i, name in enumerate(names)}
    path = pack(tmp_path / "x.tar", members, format=FORMATS[kind])
    shards = open_shards(path)
    for (name, data), asked in zip(members.items(), asked_for, strict=False):
        assert shards.read(asked) == shards.read(f"x.tar/{asked}") == data, name
        assert asked in shards and shards.size(asked) == len(data)
    with pytest.raises(KeyError):
        shards.read("b.png")
    store = ImageStore(path)
    for name, data in members.items():
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(np.asarray(store.load(tars.same_file(name))), expected)
    with pytest.raises(ValueError, match="image none.png is missing from image_root"):
        store.load("none.png")
    assert store.missing(["a.png", "x.tar/sub/b.png", "b.png", "y.tar/a.png"]) == ["b.png", "y.tar/a.png"]
    assert "there is 'sub/b.png' for 'b.png'" in missing_message(store, ["b.png"])
    assert dict.fromkeys(os.fsdecode(name) for name in listing(store)).keys() == set(shards.indexes[0].names)


def test_an_index_of_search_knows_the_pictures_of_shards(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    pack_folder(tmp_path / "x.tar", folder)
    plans = [make_plan(ImageStore(root), {}) for root in (folder, tmp_path / "x.tar")]
    digests = [{entry.path: (entry.digest, entry.size) for same in plan.encode for entry in same} for plan in plans]
    assert digests[0] == digests[1] and len(digests[0]) == 3


def test_links_are_followed_and_what_macos_adds_is_not_a_member(tmp_path):
    path = pack(tmp_path / "x.tar", {"a/1.png": png(1), "a/2.png": "a/1.png", "._a.png": b"x", "b.png": "none.png"})
    shards = open_shards(path)
    assert shards.read("a/2.png") == png(1)
    assert list(shards.indexes[0].names) == ["a/1.png", "a/2.png"]


def test_patterns_expand_as_in_a_shell():
    assert expand("a/x-{008..011}.tar") == [f"a/x-{i:03d}.tar" for i in range(8, 12)]
    assert expand("x{8..10}.tar") == ["x8.tar", "x9.tar", "x10.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand("s/{a-{8..9},b,c{x,y}}.tar") == [f"s/{name}.tar" for name in ("a-8", "a-9", "b", "cx", "cy")]
    for wrong in ("x{3..1}.tar", "x{0...9}.tar", "x{1.tar", "x{}.tar", "x1}.tar", "x{a,{b}.tar"):
        with pytest.raises(ShardError, match="write"):
            expand(wrong)


def test_a_shell_that_expanded_the_pattern_is_noticed(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: custom\nimage_root: x\ntrain_file: a.json\n")
    with pytest.raises(ValueError, match="--set image_root is given 3 times: put quotation marks around braces"):
        load_config(tmp_path / "a.yaml", [f"image_root=s-{i}.tar" for i in range(3)])
    assert load_config(tmp_path / "a.yaml", ["image_root=s-{0..2}.tar"]).image_root == "s-{0..2}.tar"


def test_a_folder_of_pictures_that_also_holds_a_tar_stays_a_folder(tmp_path):
    pack(tmp_path / "set" / "x.tar", {"a.png": png(0)})
    assert is_shards(tmp_path / "set") and is_shards(tmp_path / "set" / "x.tar")
    for other in ("00000_stats.json", "00000.parquet", ".hidden"):
        (tmp_path / "set" / other).touch()
    open_shards(tmp_path / "set")
    assert is_shards(tmp_path / "set")  # the index is no obstacle
    (tmp_path / "set" / "b.jpg").touch()
    assert not is_shards(tmp_path / "set")
    (tmp_path / "set" / "b.jpg").unlink()
    (tmp_path / "set" / "train2014").mkdir()
    assert not is_shards(tmp_path / "set") and not is_shards(tmp_path / "none")


def test_a_member_of_several_shards_needs_the_shards_name(tmp_path):
    for i in range(3):
        pack(tmp_path / f"s-{i}.tar", {"same.png": png(i), f"own{i}.png": png(10 + i)})
    for root in (tmp_path, tmp_path / "s-{0..2}.tar"):
        shards = open_shards(root)
        assert shards.read("own1.png") == shards.read("s-1.tar/own1.png") == png(11)
        assert shards.read("s-2.tar/same.png") == png(2)
        with pytest.raises(ShardError, match=r"same.png is in 3 shards of .*, as in s-0.tar/same.png"):
            shards.read("same.png")
        assert "s-1.tar/own2.png" not in shards
    assert list(open_shards(tmp_path / "s-{1..2}.tar").names) == ["s-1.tar", "s-2.tar"]
    with pytest.raises(ShardError, match="s-3.tar: the shard is not there"):
        open_shards(tmp_path / "s-{0..3}.tar")


def test_equal_hashes_are_told_apart_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "hash_of", lambda name: 7)
    monkeypatch.setattr("data.shards.hash_of", lambda name: 7)
    path = pack(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(5)})
    shards = Shards(path, ["x.tar"], [open_index(path)[0]])
    assert [shards.read(f"{i}.png") == png(i) for i in range(5)] == [True] * 5 and "9.png" not in shards


# ---------------------------------------------------------------- the index


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.tar", {"a.png": png(0), "a.txt": b"one"})
    scans = []
    scan = tars.scan
    monkeypatch.setattr(tars, "scan", lambda path: scans.append(path) or scan(path))
    first, second = open_index(path)[0], open_index(path)[0]
    assert len(scans) == 1 and (tmp_path / f"x.tar{INDEX}").exists()
    for index in (first, second):
        assert index.names == ["a.png"] and index.texts() == {"a.txt": "one"}
        assert index.digest() == first.digest()
    assert open_shards(path) is open_shards(path)
    before = files_sha256([path])
    pack(path, {"b.png": png(1), "b.txt": b"two"})
    assert open_index(path)[0].names == ["b.png"] and len(scans) == 2
    assert open_shards(path).read("b.png") == png(1) and files_sha256([path]) != before
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert open_index(path)[0].names == ["b.png"] and len(scans) == 3
    (tmp_path / f"x.tar{INDEX}").write_bytes(b"PK damaged")
    assert open_index(path)[0].names == ["b.png"] and len(scans) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar", f"x.tar{INDEX}"]  # nothing half-written


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch, caplog):
    path = pack(tmp_path / "x.tar", {"a.png": png(0), "a.txt": b"one"})
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with caplog.at_level("INFO"):
        shards = open_shards(path)
    assert "the index of 1 shards cannot be written beside them" in caplog.text and "kept in memory" in caplog.text
    assert shards.read("a.png") == png(0) and shards.indexes[0].texts() == {"a.txt": "one"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]
    monkeypatch.setattr(os, "replace", replace)
    assert open_index(path)[1] == ""


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar", "w:bz2"), ("x.tar", "w:xz")]
)
def test_compressed_tars_are_refused_with_the_reason(tmp_path, name, mode):
    path = pack(tmp_path / name, {"a.png": png(0)}, mode)
    for root in (path, tmp_path):
        with pytest.raises(ShardError, match=rf"{name} is compressed \(\w+\): a member .* without unpacking all"):
            ImageStore(root)


def test_a_shard_that_is_cut_is_named_with_byte_and_sample(tmp_path):
    path = pack(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(4)})
    whole, index = path.read_bytes(), open_index(path)[0]
    places = list(zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True))
    ends = [offset + -(-size // 512) * 512 for _, offset, size in places]
    cuts = {
        places[2][1] + 10: "ends within 2.png, at byte",  # in a picture
        places[2][1] - 100: "after 1.png",  # in a header
        ends[1]: "after 1.png, without a tar's end mark",  # between two members
        ends[3]: "after 3.png, without a tar's end mark",
        5: "not a .tar, or damaged",
        0: "not a .tar, or damaged",
    }
    for size, said in cuts.items():
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=re.escape(said)) as error:
            open_index(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(whole[: ends[1]] + b"\7" * 512 + whole[ends[1] + 512 :])
    with pytest.raises(ShardError, match=rf"is damaged at byte {ends[1]}, after 1.png"):
        open_index(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ShardError, match="goes on after its end mark"):
        open_index(path)


def test_a_shard_that_changes_or_goes_during_a_run_is_named(tmp_path):
    paths = [pack(tmp_path / f"s{i}.tar", {f"{i}.png": png(i)}) for i in range(3)]
    store = ImageStore(tmp_path)
    store.load("0.png")  # is open from now on
    offset = store.shards.indexes[0].offsets[0]
    with open(paths[0], "r+b") as file:
        file.truncate(600)
    with pytest.raises(ShardError, match=rf"s0.tar has changed since .* 0.png, at byte {offset}, cannot be read"):
        store.load("0.png")
    paths[1].unlink()
    with pytest.raises(ShardError, match=r"s1.tar is gone, so 1.png, at byte 512, cannot be read: put the shard back"):
        store.load("1.png")
    with open(paths[2], "r+b") as file:  # cut behind the index's back
        state = paths[2].stat()
        file.truncate(550)
    index = store.shards.indexes[2]
    object.__setattr__(index, "size", 550)
    os.utime(paths[2], ns=(state.st_atime_ns, index.mtime_ns))
    with pytest.raises(ShardError, match=r"s2.tar is cut short: of 2.png, at byte 512, \d+ of \d+ bytes are missing"):
        store.load("2.png")


def test_a_lost_shard_is_no_bad_sample_to_skip(tmp_path):
    pack(tmp_path / "s0.tar", {"0.png": png(0), "0.txt": b"a cat", "1.png": b"broken", "1.txt": b"a dog"})
    pack(tmp_path / "s1.tar", {"2.png": png(2), "2.txt": b"a bird"})
    table, store = build_annotations("custom train", *read_rows(tmp_path, tmp_path)), ImageStore(tmp_path)
    samples = RetrievalTrain(table, store, lambda picture: torch.zeros(3), seed=0, skip_bad_images=True)
    assert samples[0, 1].skipped and samples[0, 1].name == "s1.tar/2.png"
    (tmp_path / "s1.tar").unlink()
    store.shards.handles.clear()
    with pytest.raises(ShardError, match="s1.tar is gone, so s1.tar/2.png, at byte"):
        samples[0, 2]


def test_forks_threads_and_pickles_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.OPEN_FILES", 2)
    for i in range(5):
        pack(tmp_path / f"{i}.tar", {f"{i}-{j}.png": png(10 * i + j) for j in range(4)})
    store = ImageStore(tmp_path)
    names = [f"{i}-{j}.png" for j in range(4) for i in range(5)]
    expected = [store.shards.read(name) for name in names]  # opened by the parent, before the fork
    assert len(store.shards.handles) <= 2
    assert [pickle.loads(pickle.dumps(store)).shards.read(name) for name in names] == expected
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            same = all([store.shards.read(name) for name in names] == expected for _ in range(20))
            os._exit(0 if same else 1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.shards.read, names * 20)) == expected * 20


# ---------------------------------------------------------------- samples of the shards themselves


def sample_members() -> dict[str, bytes]:
    return {
        "k2.png": png(2), "k2.txt": b"a cat\n\nthe cat\n", "k2.json": b'{"image_id": 5, "caption": "x"}',
        "d/k1.left.png": png(1), "d/k1.txt": b"a dog", "k3.json": b'{"caption": ["a bird", "it flies"], "url": "u"}',
        "k3.jpg": png(3), "k3.cls": b"1",
    }  # fmt: skip


def test_samples_have_the_captions_beside_them(tmp_path):
    path = pack(tmp_path / "s-0.tar", sample_members())
    pack(tmp_path / "s-1.tar", {"k2.png": png(4), "k2.json": b'{"image_id": 5, "caption": "a second cat"}'})
    rows, notes = read_rows(tmp_path, tmp_path)
    assert [(row.image, row.captions, row.image_id) for row in rows] == [
        ("s-0.tar/d/k1.left.png", ["a dog"], None),
        ("s-0.tar/k2.png", ["a cat", "the cat"], "5"),
        ("s-0.tar/k3.jpg", ["a bird", "it flies"], None),
        ("s-1.tar/k2.png", ["a second cat"], "5"),
    ]
    assert rows[1].group == rows[3].group  # an image_id counts in all shards of a set
    assert "4 pictures in 2 shards" in notes[0] and "url (1 rows)" in notes[1]
    store = ImageStore(tmp_path)
    assert store.missing(row.image for row in rows) == []
    one = read_rows(path, path).rows
    assert [row.image for row in one] == [row.image for row in rows[:3]]
    assert ImageStore(path).missing(row.image for row in one) == []
    with pytest.raises(ValueError, match="must be one of the shards of image_root"):
        read_rows(tmp_path, tmp_path / "s-{1..1}.tar")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="image_root .*pictures"):
        read_rows(path, tmp_path / "pictures")


def test_a_caption_ends_at_a_newline_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png(0))
    (tmp_path / "folder" / "a.txt").write_bytes("a\u2028red\x85cat\x0bhere\r\n\r\nthe cat\r\n".encode())
    pack_folder(tmp_path / "x.tar", tmp_path / "folder")
    for root in (tmp_path / "folder", tmp_path / "x.tar"):
        assert read_rows(root, root).rows[0].captions == ["a\u2028red\x85cat\x0bhere", "the cat"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.png": png(0), "a.jpg": png(0), "a.txt": b"x"}, "x.tar: a.png and a.jpg share the key a"),
        ({"a.png": png(0), "a.txt": b"x", "a.zh.txt": b"y"}, "x.tar: a.txt and a.zh.txt share the key a"),
        ({"a.png": png(0), "a.json": b"{}", "a.meta.json": b"{}"}, "x.tar: a.json and a.meta.json share the key a"),
        ({"a.png": png(0), "b.txt": b"x"}, "x.tar: b.txt has no picture of its key beside it"),
        ({"a.png": png(0), "a.json": b"{"}, "x.tar: a.json is not valid JSON"),
        ({"a.png": png(0), "a.json": b"[]"}, "x.tar: a.json is not an object"),
        ({"a.png": png(0), "a.txt": b"\xff\xfe"}, "x.tar: a.txt, at byte 1536, is not UTF-8"),
        ({"a.png": png(0)}, "x.tar: no sample has a text"),
        (
            {"a.png": png(0), "a.txt": b"x", "b.png": png(1), "b.json": b'{"caption": 3}'},
            "x.tar, sample x.tar/b.png needs",
        ),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, members, said):
    path = pack(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_rows(path, path)


# ---------------------------------------------------------------- runs


@pytest.fixture
def folder_of_samples(tmp_path):
    """Seven pictures with captions below a folder, and the same in three shards."""
    for i in range(7):
        place = tmp_path / "unpacked" / f"s-{i // 3}.tar"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(i))
        (place / f"{i}.txt").write_text(f"word {i}\nword and word {i}\n")
    for place in (tmp_path / "unpacked").iterdir():
        pack_folder(tmp_path / "shards" / place.name, place)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_shards_equal_those_of_the_unpacked_folder(folder_of_samples, workers):
    def batches(root: str, train_file: str) -> list:
        cfg = RetrievalConfig(
            dataset="custom", image_root=str(folder_of_samples / root), ann_root=str(folder_of_samples),
            train_file=train_file, val_file=train_file, test_file=train_file, image_size=16, num_workers=workers,
        )  # fmt: skip
        order = GlobalBatchSampler(14, 4, 2, range(2), seed=3)
        order.set_epoch(1, 1)  # resumed within an epoch
        return list(train_loader(cfg, load_annotations(cfg, "train"), order, CPU))

    expected = batches("unpacked", "unpacked")
    for root, train_file in (("shards", "shards"), ("shards/s-{0..2}.tar", "shards/s-{0..2}.tar")):
        found = batches(root, train_file)
        assert len(found) == len(expected) == 2
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine.image, theirs.image) and torch.equal(mine.idx, theirs.idx)
            assert torch.equal(mine.text.input_ids, theirs.text.input_ids) and mine.names == theirs.names


@pytest.mark.slow
def test_a_run_from_a_tar_is_bit_equal_to_one_from_the_folder_also_when_killed(tiny_run):
    """Annotations in a JSON file: the pictures come out of a .tar, by two workers, over a kill and a resumption."""
    expected = straight(tiny_run)
    config = YAML().load(tiny_run / "config.yaml")
    pack_folder(tiny_run / "images.tar", tiny_run / "images")
    shutil.rmtree(tiny_run / "images")
    config |= {"image_root": str(tiny_run / "images.tar"), "num_workers": 2}
    YAML().dump(config, tiny_run / "config.yaml")
    assert sabotaged(tiny_run, "SIGKILL", 5).returncode == -9
    assert run(tiny_run, "--resume", "auto", "--set", "save_every_steps=2") == 0
    assert_equal_outcomes(outcome(tiny_run / "out"), expected)


def test_a_run_from_shards_alone_is_bit_equal_to_one_from_their_folders(tiny_run):
    """Captions from the shards too; one tar for each split."""
    config = YAML().load(tiny_run / "config.yaml")
    for split in ("train", "val", "test"):
        (tiny_run / "pairs" / split).mkdir(parents=True)
        for row in json.loads((tiny_run / f"{split}.json").read_text()):
            name = Path(row["image"])
            shutil.copy(tiny_run / "images" / name, tiny_run / "pairs" / split / name)
            (tiny_run / "pairs" / split / f"{name.stem}.txt").write_text("\n".join(row["caption"]))
        pack_folder(tiny_run / "shards" / f"{split}.tar", tiny_run / "pairs" / split)
    logs = {}
    for root, ending in (("pairs", ""), ("shards", ".tar")):
        config |= {"image_root": str(tiny_run / root), "ann_root": str(tiny_run / root), "max_epoch": 1}
        config |= {f"{split}_file": f"{split}{ending}" for split in ("train", "val", "test")}
        YAML().dump(config, tiny_run / f"{root}.yaml")
        argv = ["--config", str(tiny_run / f"{root}.yaml"), "--output_dir", str(tiny_run / "out" / root)]
        assert train_retrieval.main([*argv, "--device", "cpu"]) == 0
        files = [f"{split}_file{end}" for split in ("train", "val", "test") for end in ("", "_sha256")]
        logs[root] = lines(tiny_run / "out" / root / "log.txt", *files)
        weights = torch.load(tiny_run / "out" / root / "checkpoint_best.pth", weights_only=True)["model"]
        logs[f"{root} weights"] = [tensor.numpy().tobytes() for tensor in weights.values()]
    assert logs["pairs"] == logs["shards"] and len(logs["pairs"]) == 3
    assert logs["pairs weights"] == logs["shards weights"]


# ---------------------------------------------------------------- texts in one buffer

TEXTS = ["a cat", "", "na\u00efve \u732b", "\ud83d", "b" * 300]


def test_texts_are_a_list_in_one_buffer():
    texts = Texts(TEXTS)
    assert list(texts) == TEXTS == texts and texts == Texts(TEXTS) and len(texts) == 5
    assert texts != TEXTS[:4] and texts != Texts(TEXTS[::-1]) and texts != tuple(TEXTS)
    assert [texts[i] for i in range(-5, 5)] == [TEXTS[i] for i in range(-5, 5)]
    assert texts[np.int64(2)] == TEXTS[2] and texts[1:4] == TEXTS[1:4] and texts[::-2] == TEXTS[::-2]
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            texts[wrong]
    with pytest.raises(TypeError):
        texts["a"]
    assert pickle.loads(pickle.dumps(texts)) == texts and not Texts() and Texts() == []
    assert Texts.of(bytes(texts.data), bytes(texts.bounds)) == texts and texts.index("") == 1


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the memory of a process is Linux's to tell")
def test_a_forked_worker_does_not_copy_the_captions():
    """As a list they are copied nearly whole; the same measurement on both, so that it can fail."""
    copied = {}
    for kind in (list, Texts):
        texts = kind(captions(60_000))
        gc.collect()
        queue = get_context("fork").Queue()
        worker = get_context("fork").Process(target=work, args=(texts, 0, queue))
        worker.start()
        copied[kind] = queue.get(timeout=60)[0]
        worker.join()
    assert copied[list] > 4 and copied[Texts] < copied[list] / 3, copied


def test_a_table_of_annotations_holds_its_texts_in_buffers(folder_of_samples):
    cfg = RetrievalConfig(
        dataset="custom", image_root=str(folder_of_samples / "shards"), ann_root=str(folder_of_samples),
        train_file="shards", val_file="shards",
    )  # fmt: skip
    table = load_annotations(cfg, "train")
    assert all(isinstance(texts, Texts) for texts in (table.images, table.captions, table.id_names))
