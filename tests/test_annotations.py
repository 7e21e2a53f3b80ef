"""Annotation files: BLIP's ids, every format, errors that name file, row and key, downloads that leave nothing half."""

import json
import logging
import socket
from urllib.error import URLError

import numpy as np
import pytest

from checkpoints import download
from configs.datasets import ANNOTATIONS_URL, DATASETS, SPLITS, DatasetInfo
from configs.schema import RetrievalConfig, load_config
from data import annotations as module
from data import scenes
from data.annotations import available_splits, build_annotations, load_annotations, split_rows
from data.images import missing_message, open_store
from data.rows import read_rows
from tests.local_server import Handler, html_reply


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def custom(root, **files):
    return RetrievalConfig(dataset="custom", ann_root=str(root), image_root=str(root), **files)


def load(tmp_path, rows, name="train.json"):
    file = write(tmp_path / name, rows)
    return build_annotations("custom train", *read_rows(file))


# ---------------------------------------------------------------- the table


def test_train_ids_are_blips_running_numbers(tmp_path):
    """BLIP: a new image_id gets the next number, in the order of the file."""
    rows = [("b.jpg", 7), ("a.jpg", "x"), ("b.jpg", 7), ("c.jpg", "9"), ("d.jpg", 9), ("a.jpg", "x")]
    write(
        tmp_path / "coco_karpathy_train.json",
        [{"caption": f"Caption, {n}!", "image": image, "image_id": id_} for n, (image, id_) in enumerate(rows)],
    )
    table = load_annotations(RetrievalConfig(dataset="coco", ann_root=str(tmp_path)), "train")
    assert table.name == "coco train" and table.files == [tmp_path / "coco_karpathy_train.json"]
    assert table.images == ["b.jpg", "a.jpg", "c.jpg", "d.jpg"]
    assert table.image_ids.tolist() == [0, 1, 2, 2]  # one image_id, two pictures
    assert table.captions == [f"caption, {n}" for n in range(6)]
    assert table.caption_image.tolist() == [0, 1, 0, 2, 3, 1]
    assert table.caption_ids.tolist() == [0, 1, 0, 2, 2, 1]
    assert table.image_ids.dtype == table.caption_image.dtype == np.int64


def test_a_blank_image_id_is_none(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": f"caption {i}", "image_id": ""} for i in range(2)]
    assert load(tmp_path, rows).image_ids.tolist() == [0, 1]


def test_evaluation_rows_and_cleaning(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["One (1).", "TWO"]}, {"image": "b.jpg", "caption": ["word " * 40]}]
    write(tmp_path / "flickr30k_test.json", rows)
    table = load_annotations(RetrievalConfig(dataset="flickr", ann_root=str(tmp_path)), "test")
    assert table.captions == ["one 1", "two", " ".join(["word"] * 30)]
    assert table.image_ids.tolist() == [0, 1] and table.caption_ids.tolist() == [0, 0, 1]


def test_list_lines_and_csv_are_the_same(tmp_path):
    rows = [
        {"image": "sub/a b.jpg", "caption": 'says "hi", twice', "image_id": "1"},
        {"image": "b.jpg", "caption": "zwölf Boxkämpfer"},
        {"image": "sub/a b.jpg", "caption": "line\u2028separator", "image_id": 1},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    table = 'caption,image,image_id\r\n"says ""hi"", twice",sub/a b.jpg,1\r\nzwölf Boxkämpfer,b.jpg,\r\n'
    table += "line\u2028separator,sub/a b.jpg,1\r\n"
    texts = {"a.json": json.dumps(rows), "b.jsonl": lines, "c.csv": table, "d.txt": table, "e.json": "\ufeff" + lines}
    texts["f.csv"] = "\ufeff" + table
    expected = load(tmp_path, rows)
    assert expected.image_ids.tolist() == [0, 1] and len(expected.captions) == 3
    for name, text in texts.items():
        found = load(tmp_path, text, name)
        assert (found.images, found.captions) == (expected.images, expected.captions), name
        assert found.caption_ids.tolist() == [0, 1, 0]
    one = load(tmp_path, json.dumps(rows[0], indent=1), "one.json")
    assert one.images == ["sub/a b.jpg"]


# ---------------------------------------------------------------- what is refused

GOOD = {"image": "a.jpg", "caption": "a"}
BAD_FILES = {
    "empty": ("", "has no rows"),
    "empty list": ("[]", "has no rows"),
    "blank": (" \n\n", "has no rows"),
    "no JSON": ("[{image: 'a'}]", "not valid JSON .*line 1, column 3"),
    "truncated": (
        '[{"image": "a.jpg", "caption": "a"},\n {"image": "b.j',
        "ends too early, so fetch or write it again",
    ),
    "truncated list": ('[{"image": "a.jpg", "caption": "a"}', "ends too early"),
    "truncated line": ('{"image": "a.jpg", "caption": "a"}\n{"image": "b', "row 2 is not valid JSON .*ends too early"),
    "bad line": ('{"image": "a.jpg", "caption": "a"}\n\nnonsense\n', "row 3 is not valid JSON"),
    "deep": ("[" * 100000, "nested too deeply|not valid JSON"),
    "HTML": ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is an HTML page"),
    "another object": ('{"images": [], "dataset": "coco"}', r"one object \(images, dataset\), not a list of rows"),
    "a text": ('"image"', "neither a JSON list"),
    "prose": ("version https://git-lfs.github.com/spec/v1\noid 1", "neither a JSON list"),
    "row a list": ([GOOD, ["a.jpg", "a"]], "row 2 is a list, not an object"),
    "row null": ([None], "row 1 is the value null, not an object"),
    "no image": ([GOOD, GOOD, {"caption": "a"}], "row 3 has no key 'image', only caption"),
    "no caption": (
        [{"image": "a.jpg", "captoin": "a"}],
        "row 1 has no key 'caption', did you mean 'captoin'.* image, ",
    ),
    "image a number": ([GOOD | {"image": 3}], "row 1 needs under 'image' a path .*not the value 3"),
    "image empty": ([GOOD | {"image": " "}], "row 1 needs under 'image' a path"),
    "caption a number": ([GOOD | {"caption": 3.5}], "row 1 needs under 'caption' a text or a list .*not the value 3.5"),
    "caption null": ([GOOD | {"caption": None}], "row 1: the row has no caption: give it one"),
    "caption an object": ([GOOD | {"caption": {}}], "row 1 needs under 'caption'.*not an object"),
    "no captions": ([GOOD | {"caption": []}], "row 1: the row has no caption: give it one"),
    "caption in list": ([GOOD | {"caption": ["a", 1]}], "row 1 needs under 'caption'.*a list with the value 1 in it"),
    "caption empty": ([GOOD, GOOD | {"caption": " "}], "row 2: the caption ' ' .*'caption'.* is empty after cleaning"),
    "caption dots": ([GOOD | {"caption": ["fine", "...!"]}], "row 1: the caption '...!'"),
    "caption tab": ([GOOD | {"caption": "\t"}], "row 1: the caption"),
    "id a list": ([GOOD | {"image_id": [1]}], "row 1 needs under 'image_id'"),
    "id a truth": ([GOOD | {"image_id": True}], "row 1 needs under 'image_id'.*the value true"),
    "id a fraction": ([GOOD | {"image_id": 1.5}], "row 1 needs under 'image_id'"),
    "two ids": ([GOOD | {"image_id": 1}, GOOD | {"image_id": 2}], "row 2: image a.jpg has image_id '2' .*'1' in row 1"),
    "id once": ([GOOD | {"image_id": 1}, GOOD], "row 2: image a.jpg has image_id None .*'1' in row 1"),
    "up": ([GOOD | {"image": "../a.jpg"}], "row 1 needs under 'image' a path inside image_root.*'../a.jpg'"),
    "up inside": ([GOOD | {"image": "a/../../b.jpg"}], "a path inside image_root"),
    "up backslash": ([GOOD | {"image": "a\\..\\b.jpg"}], "a path inside image_root"),
    "absolute": ([GOOD | {"image": "/etc/passwd"}], "a path inside image_root"),
    "drive": ([GOOD | {"image": "C:\\a.jpg"}], "a path inside image_root"),
    "home": ([GOOD | {"image": "~/a.jpg"}], "a path inside image_root"),
    "nul": ([GOOD | {"image": "a\0.jpg"}], "a path inside image_root"),
}
BAD_CSV = {
    "no column": ("image,words\na.jpg,a\n", "has no column 'caption'"),
    "no header": ("a.jpg,a man\n", "has no column 'image'"),
    "comma": ("image,caption\na.jpg,a\nb.jpg,a man, a dog\n", "row 2 has more cells than the header"),
    "short": ("image,caption\na.jpg\n", "row 1 has fewer cells than the header"),
    "open quote": ('image,caption\na.jpg,"never closed\n', "row 1 is not valid CSV"),
    "only header": ("image,caption\n", "has no rows"),
    "empty": ("", "has no rows"),
}
CASES = [(f"{name}.json", *case) for name, case in BAD_FILES.items()]
CASES += [(f"{name}.csv", *case) for name, case in BAD_CSV.items()]


@pytest.mark.parametrize(("name", "rows", "said"), CASES, ids=[case[0] for case in CASES])
def test_bad_files_are_refused(tmp_path, name, rows, said):
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path, rows, name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("data", "said"), [
    ("[]".encode("utf-16"), r"looks like UTF-16: .*\(iconv -f UTF-16 -t UTF-8 a.json > utf8_a.json\)"),
    ('[{"image": "ä.png"}]'.encode("utf-16-le"), "iconv -f UTF-16 -t"),
    ('[{"image": "Käse.png"}]'.encode("latin-1"), "If '.*Käse.png.*' reads well, .*iconv -f WINDOWS-1252 -t UTF-8"),
    (b"\x1f\x8b\x08\0", "but binary"),
    (b"PK\x03\x04\xff", "but binary"),
])  # fmt: skip
def test_other_encodings_are_refused_with_the_command_that_converts_them(tmp_path, data, said):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.json is not UTF-8 text .*{said}") as error:
        read_rows(tmp_path / "a.json")
    assert "save it as UTF-8" in str(error.value)


def test_a_missing_file_names_ann_root(tmp_path):
    cfg = RetrievalConfig(dataset="emoji", ann_root=str(tmp_path), image_root=str(tmp_path))
    with pytest.raises(ValueError, match="train.json cannot be read .No such file.*set ann_root"):
        load_annotations(cfg, "train")
    with pytest.raises(
        ValueError, match="is a folder without annotations: it needs metadata.jsonl or metadata.csv, or"
    ):
        read_rows(tmp_path, tmp_path)


# ---------------------------------------------------------------- custom: splits


def rows_of(count, per_image=2):
    return [{"image": f"{i}.jpg", "caption": f"caption {i} {j}"} for i in range(count) for j in range(per_image)]


def test_custom_files_are_read_as_they_are(tmp_path):
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        write(tmp_path / f"{split}.json", rows_of(count))
    cfg = custom(tmp_path, train_file="train.json", val_file=str(tmp_path / "val.json"), test_file="test.json")
    assert [len(load_annotations(cfg, split).images) for split in ("train", "val", "test")] == [5, 3, 2]


@pytest.mark.parametrize(("count", "size"), [(10, 2), (100, 10)])
def test_missing_splits_are_cut_off_by_image_and_said(tmp_path, caplog, count, size):
    write(tmp_path / "train.json", rows_of(count))
    with caplog.at_level(logging.INFO):
        parts = {split: load_annotations(custom(tmp_path, train_file="train.json"), split) for split in SPLITS}
    assert f"{count - 2 * size} train, {size} test, {size} val" in caplog.text and "train.json" in caplog.text
    images = [image for part in parts.values() for image in part.images]
    assert len(images) == len(set(images)) == count
    assert len(parts["test"].captions) == 2 * size
    again = load_annotations(custom(tmp_path, train_file="train.json"), "test")
    assert again.images == parts["test"].images
    write(tmp_path / "val.json", rows_of(3))
    with_val = load_annotations(custom(tmp_path, train_file="train.json", val_file="val.json"), "test")
    assert with_val.images == parts["test"].images  # a val_file given later leaves the test set alone


def test_splits_keep_an_image_id_together(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "x", "image_id": i // 4} for i in range(80)]
    file = write(tmp_path / "train.json", rows)
    parts = split_rows(read_rows(file).rows, ["test", "val"])
    ids = [{row.image_id for row in part} for part in parts.values()]
    assert [len(part) for part in ids] == [16, 2, 2]
    assert len(set.union(*ids)) == 20


def test_impossible_splits_are_refused(tmp_path):
    write(tmp_path / "train.json", rows_of(5))
    with pytest.raises(ValueError, match="5 different images, too few .*set test_file and val_file"):
        load_annotations(custom(tmp_path, train_file="train.json"), "val")
    with pytest.raises(ValueError, match="neither a val_file nor a train_file"):
        load_annotations(custom(tmp_path, test_file="train.json"), "val")


# ---------------------------------------------------------------- shipped data sets


def test_emoji_is_shipped_whole():
    cfg = RetrievalConfig(dataset="emoji", ann_root="data/emoji", image_root="data/emoji/images.zip")
    sizes = {}
    for split in SPLITS:
        table = load_annotations(cfg, split)
        assert missing_message(open_store(cfg), table.images) == ""
        sizes[split] = len(table.images), len(set(table.image_ids.tolist())), len(table.captions)
    assert sizes == {"train": (5997, 1612, 15470), "val": (359, 359, 926), "test": (700, 700, 1744)}


def test_scenes_are_drawn_on_first_use(tmp_path, monkeypatch):
    for name in ("TRAIN_IMAGES", "VAL_IMAGES", "TEST_IMAGES"):
        monkeypatch.setattr(scenes, name, 4)
    cfg = RetrievalConfig(dataset="scenes", ann_root=str(tmp_path / "s"), image_root=str(tmp_path / "s"))
    train, test = load_annotations(cfg, "train"), load_annotations(cfg, "test")
    assert (len(train.images), len(train.captions), test.caption_ids.tolist()) == (
        4,
        12,
        [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3,
    )
    assert missing_message(open_store(cfg), [*train.images, *test.images]) == ""


def test_unknown_data_set():
    with pytest.raises(ValueError, match="dataset must be one of coco, flickr, .*, got 'imagenet'"):
        RetrievalConfig(dataset="imagenet")


def test_a_data_set_is_one_entry_of_the_table_and_a_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "birds.yaml").write_text(f"dataset: birds\nimage_root: {tmp_path}\nann_root: {tmp_path}\n")
    with pytest.raises(ValueError, match="dataset must be one of coco, .*, got 'birds'"):
        load_config(tmp_path / "birds.yaml")
    monkeypatch.setitem(DATASETS, "birds", DatasetInfo(files="birds_{}.json"))
    cfg = load_config(tmp_path / "birds.yaml")
    assert available_splits(cfg) == list(SPLITS)
    for count, split in enumerate(SPLITS, 1):
        write(tmp_path / f"birds_{split}.json", rows_of(count))
        table = load_annotations(cfg, split)
        assert (table.name, len(table.images), len(table.captions)) == (f"birds {split}", count, 2 * count)
    with pytest.raises(ValueError, match="would be ignored, as dataset 'birds' names its own files"):
        load_config(tmp_path / "birds.yaml", ["train_file=a.json"])
    with pytest.raises(ValueError, match="must be one of coco, .*, birds, got 'bird', did you mean 'birds'?"):
        load_config(tmp_path / "birds.yaml", ["dataset=bird"])


# ---------------------------------------------------------------- downloads

FLICKR_VAL = json.dumps([GOOD]).encode()


@pytest.fixture
def annotation_server(server, monkeypatch):
    """Stands in for the address of BLIP's annotation files."""
    assert ANNOTATIONS_URL == "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
    monkeypatch.setattr(module, "ANNOTATIONS_URL", server.folder)
    server.content = FLICKR_VAL
    return server


def names(folder) -> list[str]:
    """Files of a folder but for locks, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_an_absent_file_is_downloaded_once(annotation_server, tmp_path):
    folder = tmp_path / "new" / "annotation"
    cfg = RetrievalConfig(dataset="flickr", ann_root=str(folder))
    assert load_annotations(cfg, "val").images == load_annotations(cfg, "val").images == ["a.jpg"]
    assert annotation_server.paths == ["/files/flickr30k_val.json"]
    assert names(folder) == ["flickr30k_val.json"]
    (folder / "flickr30k_val.json.lock").unlink()
    assert load_annotations(cfg, "val").images == ["a.jpg"]
    assert [path.name for path in folder.iterdir()] == ["flickr30k_val.json"]  # a file that is there needs no lock


def offline(server, patch):
    patch.setattr(download.time, "sleep", None)  # is not called: the message comes at once
    unreachable(patch, URLError(socket.gaierror(-3, "Temporary failure in name resolution")))


def time_out(server, patch):
    unreachable(patch, TimeoutError("timed out"))


def unreachable(patch, error):
    def urlopen(request, timeout):
        raise error

    patch.setattr(download.urllib.request, "urlopen", urlopen)


def cut(server, patch):
    patch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [2]


def broken_after_two_bytes(patch, error):
    def copy(answer, file, length, name):
        file.write(answer.read(2))
        raise error

    patch.setattr(download, "ATTEMPTS", 1)
    patch.setattr(download, "_copy", copy)


def reset(server, patch):
    broken_after_two_bytes(patch, ConnectionResetError("reset by peer"))


def portal(server, patch):
    server.content = b"<html>please log in</html>"


def web_page(server, patch):
    server.answer = 200, b"<html>please log in</html>"
    patch.setattr(Handler, "reply", html_reply)


def gone(server, patch):
    server.answer = 404, b""


def no_room(server, patch):
    patch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1})())


BREAKS = {  # what happens, what is said, what is kept for the next attempt
    "offline": (offline, "Temporary failure in name resolution", []),
    "time-out": (time_out, "timed out", []),
    "cut": (cut, "; 2 bytes are kept in ", [".part", ".part.etag"]),
    "reset": (reset, "reset by peer", [".part", ".part.etag"]),
    "portal": (portal, "log-in page", []),
    "web page": (web_page, "a web page, not a file", []),
    "gone": (gone, "answer 404 Not Found", []),
    "no room": (no_room, "make room", []),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_failed_download_leaves_no_file_and_says_what_to_do(annotation_server, tmp_path, monkeypatch, name):
    happens, said, kept = BREAKS[name]
    happens(annotation_server, monkeypatch)
    with pytest.raises(ValueError) as error:
        load_annotations(RetrievalConfig(dataset="coco", ann_root=str(tmp_path)), "test")
    text, target = str(error.value), tmp_path / "coco_karpathy_test.json"
    assert said in text and "\n" not in text
    assert f"{target} is missing and could not be downloaded from {annotation_server.folder}{target.name} (" in text
    assert f"fetch that address on a machine with network and put the file at {target}" in text
    assert f"`python -m data.prepare convert dataset_coco.json {tmp_path}`" in text
    assert text.endswith("or set ann_root to the folder that has it") and "cache" not in text
    assert names(tmp_path) == [target.name + suffix for suffix in kept]


def test_a_folder_that_cannot_be_written_says_what_to_do(annotation_server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Not a directory.*: fetch that address on a machine with network"):
        load_annotations(RetrievalConfig(dataset="coco", ann_root=str(tmp_path / "file" / "below")), "test")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionResetError("reset by peer")])
def test_an_interrupted_download_is_continued_by_the_next_run(annotation_server, tmp_path, monkeypatch, error):
    cfg = RetrievalConfig(dataset="flickr", ann_root=str(tmp_path))
    with monkeypatch.context() as patch:
        broken_after_two_bytes(patch, error)
        with pytest.raises((KeyboardInterrupt, ValueError)):
            load_annotations(cfg, "val")
    assert not (tmp_path / "flickr30k_val.json").exists()
    assert load_annotations(cfg, "val").images == ["a.jpg"]
    assert [request.get("Range") for request in annotation_server.requests] == [None, "bytes=2-"]
    assert names(tmp_path) == ["flickr30k_val.json"]
