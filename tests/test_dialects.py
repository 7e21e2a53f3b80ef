"""Every dialect of annotation files, with invented content: what is read, what is said, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import RetrievalConfig, load_config, save_config
from data.annotations import NO_IMAGE, build_annotations, load_annotations
from data.checks import check_data
from data.dialects import read_dialect
from data.keys import list_in_cell
from data.rows import Row, read_rows, same_file
from retrieval.metrics import chance_metrics, retrieval_metrics
from retrieval.provenance import files_sha256

HATS = ["a red hat", "the hat is red"]
ROWS = [("a/1.png", HATS), ("a/2.png", ["a blue boat"]), ("b/3.png", ["two green trees"])]


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


def karpathy(name: str, path: bool) -> str:
    images = []
    for number, ((image, captions), split) in enumerate(zip(ROWS, ("train", "restval", "train"), strict=True)):
        folder, _, file = image.partition("/")
        images.append({
            "filename": file if path else image, "imgid": number, "split": split, "sentids": [],
            "sentences": [{"raw": text, "tokens": text.split(), "imgid": number} for text in captions],
        } | ({"filepath": folder} if path else {}))  # fmt: skip
    return json.dumps({"images": images, "dataset": name})


PAIRS = [(image, caption) for image, captions in ROWS for caption in captions]
COCO = {
    "info": {}, "licenses": [],
    "images": [{"id": 70 + n, "file_name": image, "height": 3} for n, (image, _) in enumerate(ROWS)],
    "annotations": [{"id": n, "image_id": 70 + [i for i, _ in ROWS].index(image), "caption": text}
                    for n, (image, text) in enumerate(PAIRS)],
}  # fmt: skip
PERSONS = [{"id": n, "file_path": image, "captions": texts, "split": "train", "processed_tokens": []}
           for n, (image, texts) in enumerate(ROWS)]  # fmt: skip
DIALECTS = {
    "BLIP.json": (json.dumps([{"image": i, "caption": c} for i, c in ROWS]), []),
    "karpathy_rsicd.json": (
        karpathy("rsicd", False), ["Karpathy's layout of rsicd", "filename as image", "imgid as image_id"]
    ),
    "karpathy_coco.json": (karpathy("coco", True), ["filepath as the folder of filename", "sentences as caption"]),
    "captions_val2014.json": (json.dumps(COCO), ["COCO's layout, 3 images and 4 captions"]),
    "results.csv": (
        lines("image_name| comment_number| comment", *(f'{i}| {n}| {c}' for n, (i, c) in enumerate(PAIRS))),
        ["separated by bars", "image_name as image, comment as caption", "comment_number (4 rows)"],
    ),
    "Flickr8k.token.txt": (lines(*(f"{i}#{n}\t{c}" for n, (i, c) in enumerate(PAIRS))), ["lines of Flickr8k's kind"]),
    "captions.txt": (lines("image,caption", *(f"{i},{c}" for i, c in PAIRS)), []),
    "reid_raw.json": (json.dumps(PERSONS), ["file_path as image, captions as caption, id as image_id", "processed_"]),
    "clip.csv": (
        lines("filepath\ttitle", *(f"{i}\t{c}" for i, c in PAIRS)), ["separated by tabs", "filepath as image, title as"]
    ),
    "excel.csv": ("\ufeffimage;caption\r\n" + "\r\n".join(f"{i};{c}" for i, c in PAIRS), ["separated by semicolons"]),
    "metadata.jsonl": (
        lines(*(json.dumps({"file_name": i, "text": c}) for i, c in PAIRS)), ["file_name as image, text as caption"]
    ),
    "metadata.csv": (lines("file_name,text", *(f"{i},{c}" for i, c in PAIRS)), ["file_name as image, text as caption"]),
    "columns.csv": (
        lines("image,caption,caption_2,Width", 'a/1.png,a red hat,the hat is red,9', "a/2.png,a blue boat,,9",
              "b/3.png,two green trees,,9"), ["caption_2 as further captions", "not used: Width (3 rows)"],
    ),
    "only_numbered.csv": (
        lines("img_path,caption_1,caption_2", 'a/1.png,a red hat,the hat is red', "a/2.png,a blue boat,",
              "b/3.png,,two green trees"), ["img_path as image, caption_1, caption_2 as further captions"],
    ),
    "cells_json.tsv": (
        lines("image\tcaptions", *('{}\t"{}"'.format(i, json.dumps(c).replace('"', '""')) for i, c in ROWS)),
        ["captions as caption"],
    ),
    "cells_python.csv": (lines("image,caption", *(f'{i},"{c!r}"' for i, c in ROWS)), []),
    "cells_numpy.csv": (lines("image,caption", *(f'{i},"{np.array(c)}"' for i, c in ROWS)), []),
    "spellings.json": (
        json.dumps([{"image": i, "caption": c} for i, c in
                    zip(["./a/1.png", "a\\1.png", "a//2.png", "b/./3.png"], [c for _, c in PAIRS], strict=True)]), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_gives_the_same_rows_and_says_what_it_took(tmp_path, name):
    text, said = DIALECTS[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = read_rows(tmp_path / name)
    table = build_annotations("custom train", *found)
    assert table.images == [image for image, _ in ROWS] and table.image_ids.tolist() == [0, 1, 2]
    assert [(table.images[i], c) for i, c in zip(table.caption_image, table.captions, strict=True)] == PAIRS
    assert [part for part in said if part not in "; ".join(found.notes)] == [], found.notes
    assert all(str(tmp_path / name) in note for note in found.notes) and (found.notes or not said)


def folder_of_texts(root: Path) -> None:
    for image, captions in ROWS:
        (root / image).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(root / image)
        (root / image).with_suffix(".txt").write_text("\n".join(captions) + "\n\n")


def test_a_folder_of_pictures_and_texts(tmp_path):
    folder_of_texts(tmp_path / "images" / "set")
    rows, notes = read_rows(tmp_path / "images" / "set", tmp_path / "images")
    assert [(row.image, row.captions) for row in rows] == [(f"set/{image}", captions) for image, captions in ROWS]
    assert "3 pictures, each with the captions of the .txt beside it" in notes[0]
    before = files_sha256([tmp_path / "images" / "set"])
    (tmp_path / "images" / "set" / "a" / "1.txt").write_text("another hat")
    assert files_sha256([tmp_path / "images" / "set"]) != before
    with pytest.raises(ValueError, match="put it under image_root"):
        read_rows(tmp_path / "images" / "set", tmp_path / "images" / "set" / "a")
    (tmp_path / "images" / "set" / "a" / "lost.txt").write_text("x")
    with pytest.raises(ValueError, match="1 text files have no picture beside them, the first is lost.txt"):
        read_rows(tmp_path / "images" / "set", tmp_path)
    (tmp_path / "images" / "set" / "a" / "lost.txt").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "set" / "a" / "1.jpg")
    with pytest.raises(ValueError, match="1.png and 1.jpg share one text file|1.jpg and 1.png share"):
        read_rows(tmp_path / "images" / "set", tmp_path)


def test_names_with_several_dots_have_texts_of_their_own(tmp_path):
    names = ["at 10.22.33.png", "cat.2.png", "cat.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"in {name}")
    assert {row.image: row.captions for row in read_rows(tmp_path, tmp_path).rows} == {n: [f"in {n}"] for n in names}


def test_pictures_of_a_folder_may_be_links(tmp_path):
    folder_of_texts(tmp_path / "far")
    (tmp_path / "images" / "set").mkdir(parents=True)
    (tmp_path / "images" / "set" / "hat.png").symlink_to(tmp_path / "far" / "a" / "1.png")
    (tmp_path / "images" / "set" / "hat.txt").write_text("a hat")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for root in ("images", "link"):
        rows = read_rows(tmp_path / root / "set", tmp_path / "images").rows
        assert [(row.image, row.captions) for row in rows] == [("set/hat.png", ["a hat"])]


def test_an_imagefolder_is_found_by_its_metadata(tmp_path):
    folder_of_texts(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(DIALECTS["metadata.jsonl"][0])
    rows, notes = read_rows(tmp_path, tmp_path)
    assert {row.file.name for row in rows} == {"metadata.jsonl"} and len(rows) == 4 and "file_name as image" in notes[0]


def test_the_row_of_flickr30k_without_its_bar_is_mended_and_said(tmp_path):
    (tmp_path / "results.csv").write_text(lines("image_name| comment_number| comment", "1.jpg| 3| A dog .",
                                                "1.jpg| 4   A dog runs across the grass ."))  # fmt: skip
    rows, notes = read_rows(tmp_path / "results.csv")
    assert [row.captions for row in rows] == [["A dog ."], ["A dog runs across the grass ."]]
    assert "1 rows lacked a bar" in notes[-1]


@pytest.mark.parametrize(("cell", "expected"), [
    ('["a", "b c"]', ["a", "b c"]), ("['a', \"it's\"]", ["a", "it's"]), ("['a' 'b']", ["a", "b"]),
    ("['a'\n 'b']", ["a", "b"]), ("[a dog]", None), ("[sic] a dog", None), ("[1, 2]", None), ("[]", []),
    ("a [b]", None), ("['a', open('x')]", None), ("['a' + 'b']", None),
])  # fmt: skip
def test_lists_in_cells(cell, expected):
    assert list_in_cell(cell) == expected


TABLES = {  # as pandas and Excel write them; each holds (a.png, x, y) and (b.png, z, None)
    "pandas' index": "\timage\tcaption\tcaption_2\n0\ta.png\tx\ty\n1\tb.png\tz\t\n",
    "empty columns and rows": "image,caption,caption_2,,\na.png,x,y,,\nb.png,z,,,\n,,,,\n   \n",
    "sep=": "sep=;\r\nimage;caption;caption_2\r\na.png;x;y\r\nb.png;z;\r\n",
    "spaces": 'image, caption, caption_2\na.png, "x", "y"\n b.png, z,\n',
    "lists in numbered columns": "image,caption_1\na.png,\"['x', 'y']\"\nb.png,\"['z']\"\n",
    "a list as text": '[{"image": "a.png", "caption": "[\'x\', \'y\']"}, {"image": "b.png", "caption": "z"}]',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_programs_write_them(tmp_path, name):
    (tmp_path / "t.csv").write_text(TABLES[name], newline="")
    table = build_annotations("custom train", *read_rows(tmp_path / "t.csv"))
    assert (table.images, table.captions) == (["a.png", "b.png"], ["x", "y", "z"])
    assert ("'' (2 rows)" in " ".join(table.notes)) == (name == "pandas' index")


def test_cells_in_brackets_that_are_no_list_are_said(tmp_path):
    (tmp_path / "t.csv").write_text('image,caption\na.png,"[a circle, in red]"\nb.png,z\n')
    assert "1 cells in brackets are neither a list" in read_rows(tmp_path / "t.csv").notes[-1]


def test_a_split_of_cocos_layout_is_honoured(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "split": split} for i, split in enumerate(["train", "val", "test"])]
    data = {"images": images, "annotations": [{"image_id": i, "caption": f"c {i}"} for i in range(3)]}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    cfg = custom(tmp_path, train_file="coco.json")
    assert [load_annotations(cfg, split).images for split in ("train", "val", "test")] == [
        ["0.png"],
        ["1.png"],
        ["2.png"],
    ]


def test_row_numbers_of_one_file_under_two_spellings():
    found = read_dialect(Path("a.csv"), "id,image,text\n1,a.png,x\n2,./a.png,y\n")
    assert "the key id is not used" in found.notes[-1]


def test_a_number_of_rows_is_not_taken_for_the_image_id():
    text = lines("id,image,text", "1,a.png,x", "2,a.png,y", "3,b.png,z")
    found = read_dialect(Path("a.csv"), text)
    assert [row.get("image_id") for _, row in found.rows] == [None] * 3
    assert "the key id is not used: one image has several" in found.notes[-1]


def test_one_file_under_two_spellings_is_one_image():
    names = ["./Å/a.png", "Å//a.png", "Å\\a.png", "A\u030a/a.png", "x/../Å/a.png"]
    assert {same_file(name) for name in names} == {"Å/a.png"}


# ---------------------------------------------------------------- refused

GOOD = '{"image": "a.png", "caption": "a"}'
REFUSED = {
    "repeated.json": ('[{"image": "a.png", "caption": "a", "caption": "b"}]', "has the key 'caption' twice"),
    "repeated.jsonl": (f'{GOOD}\n{GOOD[:-1]}, "image": "b"}}\n', "row 2 has the key 'image' twice"),
    "repeated.csv": ("image,caption,caption\na.png,x,y\n", "has the column 'caption' twice: .*caption_2"),
    "both.json": ('[{"file_path": "a.png", "img_path": "b.png", "text": "a"}]', "both file_path and img_path could be"),
    "texts.csv": ("image,title,text\na.png,x,y\n", "both title and text could be the caption: call one of them"),
    "slip.json": ('[{"image": "a.png", "caption": "a", "image_idd": 3}]',
                  "unknown key 'image_idd', did you mean 'image_id'"),
    "splits.json": ('[{"image": "a.png", "caption": "a", "splits": "val"}]',
                    "unknown key 'splits', did you mean 'split'"),
    "captoin.csv": ("image,captoin\na.png,x\n", "no column 'caption', did you mean 'captoin'"),
    "imge.json": ('[{"imge": "a.png", "caption": "a"}]', "row 1 has no key 'image', did you mean 'imge'"),
    "unknown_split.json": ('[{"image": "a", "caption": "a", "split": "trian"}]',
                           "row 1 has the split 'trian', did you mean"),
    "split_number.json": ('[{"image": "a", "caption": "a", "split": 1}]', "row 1 has the split 1"),
    "some_split.json": (f'[{GOOD[:-1]}, "split": "val"}}, {GOOD}]', "row 2 has no 'split', other rows have one"),
    "address.json": ('[{"image": "http://example.org/a.png", "caption": "a"}]', "not an address: download it"),
    "nothing.json": ('[{"image": null, "caption": []}]', "row 1 has neither an image nor a caption"),
    "annotations.json": ('{"images": [{"id": 1}], "annotations": []}', "layout of COCO, but image 1 lacks 'file_name'"),
    "boxes.json": ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
                   "layout of COCO, but image or annotation 1 lacks 'caption'"),
    "no_such_image.json": ('{"images": [{"id": 1, "file_name": "a"}],\n"annotations": [{"image_id": 2}]}',
                           "annotation 1 has an image_id, 2, of no image"),
    "same_id.json": ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
                     "image 2 has the id 1 of an image before it"),
    "karpathy_entry.json": ('{"images": ["a.png"], "dataset": "x"}', "row 1 is the text 'a.png'"),
    "token.txt": ("a.png#0\tx\nb.png y\n", "row 2 is not `name.jpg#0<TAB>caption`"),
    "fewer.csv": ("image,caption,split\na.png,x\n", "row 1 has fewer cells than the header names: every row needs 3"),
    "semicolon.csv": ("image;caption\na.png;x; y\n", "row 1 has more cells .*: put a text with semicolons into double"),
    "trailing.json": ('[{"image": "a.png", "caption": "a"},]', "not valid JSON .*: remove (the|that) comma"),
    "short_bars.csv": ("image_name| comment_number| comment\na.png| 0\n", "row 1 has fewer cells"),
    "no_images.json": ('[{"image": null, "caption": "a"}]',
                       "row 1: the row has no image: give it one, remove it, or set"),
    "only_empty.csv": ("image,caption\na.png,\n",
                       "row 1: the row has no caption: give it one, remove it, or set on_bad"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_one_meaning_is_refused(tmp_path, name):
    text, said = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_annotations(custom(tmp_path, train_file=name, val_file=name, test_file=name), "train")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- splits, several files


def custom(root: Path, **keys) -> RetrievalConfig:
    return RetrievalConfig(dataset="custom", ann_root=str(root), image_root=str(root), **keys)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def in_splits(**counts: int) -> list[dict]:
    return [{"image": f"{split}{i}.png", "caption": f"{split} {i}", "split": split}
            for split, count in counts.items() for i in range(count)]  # fmt: skip


def test_splits_of_one_file_are_honoured(tmp_path, caplog):
    write(tmp_path / "all.json", in_splits(train=3, restval=1, dev=2, test=4))
    cfg = custom(tmp_path, train_file="all.json")
    tables = {split: load_annotations(cfg, split) for split in ("train", "val", "test")}
    assert [len(table.images) for table in tables.values()] == [4, 2, 4]
    assert all(image.startswith("test") for image in tables["test"].images) and "split by image" not in caplog.text
    same = custom(tmp_path, train_file="all.json", val_file="all.json", test_file="all.json")
    assert load_annotations(same, "val").images == tables["val"].images
    assert load_annotations(custom(tmp_path, test_file="all.json"), "test").images == tables["test"].images


def test_a_split_that_the_file_lacks_is_cut_off_its_training_rows(tmp_path):
    write(tmp_path / "all.json", in_splits(train=20, test=4))
    cfg = custom(tmp_path, train_file="all.json")
    tables = {split: load_annotations(cfg, split) for split in ("train", "val", "test")}
    assert [len(table.images) for table in tables.values()] == [18, 2, 4]
    assert set(tables["train"].images) | set(tables["val"].images) == {f"train{i}.png" for i in range(20)}


def test_splits_that_contradict_the_files_are_refused(tmp_path):
    write(tmp_path / "all.json", in_splits(train=6, val=2))
    write(tmp_path / "val.json", in_splits(test=2))
    with pytest.raises(ValueError, match="all.json has rows of the split val, but there is a val_file as well"):
        load_annotations(custom(tmp_path, train_file="all.json", val_file="val.json"), "train")
    with pytest.raises(ValueError, match="val.json is read for the split val, but its rows say test"):
        load_annotations(custom(tmp_path, train_file="all.json", val_file="val.json"), "val")
    write(tmp_path / "flickr30k_val.json", in_splits(test=2))
    with pytest.raises(ValueError, match="flickr30k_val.json is read for the split val, but its rows say test"):
        load_annotations(RetrievalConfig(dataset="flickr", ann_root=str(tmp_path)), "val")


def test_several_files_are_one_set(tmp_path):
    write(tmp_path / "a.json", [{"image": "a.png", "caption": "x", "image_id": 1}, {"image": "b.png", "caption": "y"}])
    write(tmp_path / "b.json", [{"image": "c.png", "caption": "z", "image_id": 1}, {"image": "b.png", "caption": "w"}])
    cfg = custom(tmp_path, train_file=["a.json", "b.json"], val_file="a.json", test_file="a.json")
    table = load_annotations(cfg, "train")
    assert table.images == ["a.png", "b.png", "c.png"] and table.caption_image.tolist() == [0, 1, 2, 1]
    assert table.image_ids.tolist() == [0, 1, 2]  # image_id 1 of one file is not that of another
    assert table.source == f"{tmp_path / 'a.json'} + {tmp_path / 'b.json'}"
    save_config(cfg, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml").train_file == ["a.json", "b.json"]
    for wrong in ([], ["a.json", 3], [""]):
        with pytest.raises(ValueError, match="train_file must be a file or a list of files"):
            custom(tmp_path, train_file=wrong)


def test_several_files_name_splits_all_or_none(tmp_path):
    write(tmp_path / "all.json", in_splits(train=6, val=2, test=2))
    write(tmp_path / "mine.json", [{"image": "m.png", "caption": "mine"}])
    for files in (["all.json", "mine.json"], ["mine.json", "all.json"]):
        for split in ("train", "val", "test"):
            with pytest.raises(ValueError, match=r"/mine.json has no 'split', but \S+/all.json, .* its split \(train"):
                load_annotations(custom(tmp_path, train_file=files), split)
    write(tmp_path / "mine.json", [{"image": "m.png", "caption": "mine", "split": "train"}])
    cfg = custom(tmp_path, train_file=["all.json", "mine.json"])
    assert len(load_annotations(cfg, "train").images) == 7 and len(load_annotations(cfg, "test").images) == 2


def test_an_image_of_two_files_joins_their_ids(tmp_path):
    write(tmp_path / "a.json", [{"image": "a.png", "caption": "x", "image_id": 1}])
    write(tmp_path / "b.json", [{"image": "a.png", "caption": "y", "image_id": 7},
                                {"image": "b.png", "caption": "z", "image_id": 7}])  # fmt: skip
    cfg = custom(tmp_path, train_file=["a.json", "b.json"], val_file="a.json", test_file="a.json")
    assert load_annotations(cfg, "train").image_ids.tolist() == [0, 0]


# ---------------------------------------------------------------- rows without words, distractors


def test_captions_without_words_are_left_out_on_request_and_counted(tmp_path):
    rows = [{"image": "a.png", "caption": ["x", "..."]}, {"image": "b.png", "caption": " "},
            {"image": "c.png", "caption": []}, {"image": "d.png", "caption": "y"}]  # fmt: skip
    write(tmp_path / "t.json", rows)
    files = {"train_file": "t.json", "val_file": "t.json", "test_file": "t.json"}
    with pytest.raises(ValueError, match="row 1: the caption '...' .* is empty after cleaning"):
        load_annotations(custom(tmp_path, **files), "train")
    cfg = custom(tmp_path, **files, on_bad_sample="skip")
    table = load_annotations(cfg, "train")
    assert (table.images, table.captions) == (["a.png", "d.png"], ["x", "y"])
    assert "3 captions without words, or without an image, are left out, the first in row 1" in table.notes[-1]
    table = load_annotations(cfg, "test")  # a gallery keeps its pictures
    assert (table.images, table.captions) == (["a.png", "b.png", "c.png", "d.png"], ["x", "y"])
    assert table.distractors == (2, 0) and "2 captions without words" in table.notes[0]


def test_distractors_are_candidates_but_no_queries(tmp_path):
    rows = [{"image": "a.png", "caption": "x"}, {"image": "b.png", "caption": []}, {"image": "c.png", "caption": "y"},
            {"image": None, "caption": ["z", "w"]}]  # fmt: skip
    write(tmp_path / "t.json", rows)
    cfg = custom(tmp_path, test_file="t.json")
    table = load_annotations(cfg, "test")
    assert table.images == ["a.png", "b.png", "c.png"] and table.caption_image.tolist() == [0, 2, NO_IMAGE, NO_IMAGE]
    assert "1 images without captions and 2 captions without an image are distractors" in table.notes[0]
    assert table.notes[0] in check_data(cfg, {"test": table}).facts
    ids = table.image_ids, table.caption_ids
    i2t, t2i = np.tile(np.arange(4), (3, 1)), np.tile(np.arange(3), (4, 1))
    score = np.array([[0.5, 0.1, 0.9, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.9, 0.8, 0.7]])
    found = retrieval_metrics(i2t, score, t2i, score.T, *ids)
    assert found["txt_r1"] == 50 and found["txt_r5"] == 100  # two queries; a caption without an image beats the first
    assert found["img_r1"] == 0 and found["img_r5"] == 100  # two queries; the picture without captions beats both
    chance = chance_metrics(*ids)
    assert chance["txt_r1"] == pytest.approx(25) and chance["img_r1"] == pytest.approx(100 / 3)


def test_a_set_without_any_pair_is_refused():
    rows = [Row(Path("t.json"), 1, "a.png", []), Row(Path("t.json"), 2, "", ["x"])]
    with pytest.raises(ValueError, match="t.json: no image has a caption"):
        build_annotations("custom test", rows, distractors=True)


def test_empty_cells_of_a_table_are_distractors(tmp_path):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption", "image_id"), ("a.png", "x", ""), ("b.png", "", ""), ("", "y", "")]
        )
    assert load_annotations(custom(tmp_path, test_file="t.csv"), "test").distractors == (1, 1)


# ---------------------------------------------------------------- said before a run


def test_shared_captions_and_ids_are_said(tmp_path):
    train = [{"image": f"{i}.png", "caption": "a photo of a dog", "image_id": i} for i in range(6)]
    write(tmp_path / "train.json", train)
    write(tmp_path / "test.json", [{"image": f"t{i}.png", "caption": f"x {i}", "image_id": i} for i in range(4)])
    cfg = custom(tmp_path, train_file="train.json", test_file="test.json", val_file="test.json")
    found = check_data(cfg, {split: load_annotations(cfg, split) for split in ("train", "test")})
    assert any("6 of 6 captions belong to images of different image_id, so training takes right pairs for wrong ones"
               in line for line in found.warnings)  # fmt: skip
    assert "custom test: 4 image_ids are also in custom train" in found.facts


def test_the_former_name_of_on_bad_sample_still_works(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset: coco\nimage_root: x\non_bad_image: skip\n")
    assert load_config(tmp_path / "c.yaml").on_bad_sample == "skip"
    assert load_config(tmp_path / "c.yaml", ["on_bad_image=error"]).on_bad_sample == "error"
    (tmp_path / "c.yaml").write_text("dataset: coco\nimage_root: x\non_bad_image: skip\non_bad_sample: skip\n")
    with pytest.raises(ValueError, match="on_bad_image is the former name of on_bad_sample"):
        load_config(tmp_path / "c.yaml")
