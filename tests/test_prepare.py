"""Karpathy's files become the ones used here; `--check` compares them, and names what is missing with its source."""

import json
from dataclasses import replace
from urllib.error import URLError

import pytest
from PIL import Image
from ruamel.yaml import YAML

import train_retrieval
from checkpoints import download
from configs.datasets import DATASETS
from configs.schema import RetrievalConfig, load_config
from data import prepare
from data.annotations import load_annotations
from data.checks import check_data


def coco_entry(number: int, split: str, captions: int = 5) -> dict:
    folder = "val2014" if split != "train" else "train2014"
    sentences = [{"raw": f"Caption {j} of {number}.", "tokens": [], "sentid": j} for j in range(captions)]
    return {
        "filepath": folder, "filename": f"COCO_{folder}_{number:012}.jpg", "cocoid": number, "imgid": number,
        "split": split, "sentences": sentences, "sentids": [],
    }  # fmt: skip


SPLITS = ["test", "restval", "train", "val", "train"]
COCO = {"dataset": "coco", "images": [coco_entry(n, split, 6 if n == 1 else 5) for n, split in enumerate(SPLITS, 1)]}


def flickr(entry: dict) -> dict:
    kept = {key: entry[key] for key in ("imgid", "sentences", "sentids")}
    return kept | {"filename": f"{entry['imgid']}.jpg", "split": entry["split"]}


FLICKR = {"dataset": "flickr30k", "images": [flickr(coco_entry(n, split)) for n, split in enumerate(
    ["train", "val", "train", "test"], 1)]}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    def write(data) -> str:
        path = tmp_path / "dataset.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write


def rows(path) -> list:
    return json.loads(path.read_text())


def test_coco_is_converted_to_blips_layout(source, tmp_path, capsys):
    assert prepare.main(["convert", source(COCO), str(tmp_path / "out")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    train = rows(tmp_path / "out" / "coco_karpathy_train.json")
    assert len(train) == 15  # restval belongs to training, in the order of the file
    assert train[0] == {
        "caption": "Caption 0 of 2.", "image": "val2014/COCO_val2014_000000000002.jpg", "image_id": "coco_2",
    }  # fmt: skip
    assert train[5]["image"] == "train2014/COCO_train2014_000000000003.jpg"
    (test,) = rows(tmp_path / "out" / "coco_karpathy_test.json")
    assert test["image"] == "val2014/COCO_val2014_000000000001.jpg" and len(test["caption"]) == 6  # all are kept
    table = load_annotations(RetrievalConfig(dataset="coco", ann_root=str(tmp_path / "out")), "train")
    assert (len(table.images), len(table.captions)) == (3, 15)


def test_flickr_is_converted_with_running_ids(source, tmp_path):
    assert prepare.main(["convert", source(FLICKR), str(tmp_path / "out")]) == 0
    train = rows(tmp_path / "out" / "flickr30k_train.json")
    assert [row["image_id"] for row in train] == [0] * 5 + [1] * 5
    assert train[5] == {"caption": "Caption 0 of 3.", "image": "flickr30k-images/3.jpg", "image_id": 1}
    assert rows(tmp_path / "out" / "flickr30k_val.json")[0]["image"] == "flickr30k-images/2.jpg"


def without(key: str) -> dict:
    entries = [dict(entry) for entry in COCO["images"]]
    del entries[3][key]
    return {**COCO, "images": entries}


BAD = {
    "not JSON": ("[{", "not valid JSON"),
    "a list": ([1], "not one of Karpathy's files"),
    "other data set": ({"dataset": "flickr8k", "images": []}, "'flickr8k', not coco or flickr30k"),
    "data set a list": ({"dataset": ["coco"], "images": []}, "not coco or flickr30k"),
    "no file name": (without("filename"), "image 4 lacks.*'filename'"),
    "no sentences": (without("sentences"), "image 4 lacks.*'sentences'"),
    "no cocoid": (without("cocoid"), "image 4 lacks.*'cocoid'"),
    "unknown split": ({**COCO, "images": [{**COCO["images"][0], "split": "dev"}]}, "image 1 lacks.*'dev'"),
    "no captions": ({**COCO, "images": [{**COCO["images"][0], "sentences": []}]}, "image 1: .*non-empty"),
    "entry a text": ({**COCO, "images": ["a.jpg"]}, "image 1 lacks"),
    "no test": ({**COCO, "images": COCO["images"][1:]}, "no image of the split test"),
}


@pytest.mark.parametrize(("data", "said"), BAD.values(), ids=BAD.keys())
def test_what_is_not_karpathys_is_refused_and_nothing_is_written(source, tmp_path, capsys, data, said):
    path = source(data)
    assert prepare.main(["convert", path, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
    with pytest.raises(ValueError, match=said):
        prepare.convert(tmp_path / "dataset.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_files_are_left_alone(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "coco_karpathy_val.json").write_text("mine")
    assert prepare.main(["convert", source(COCO), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_convert_is_the_only_command():
    for wrong in ([], ["check", "folder"], ["convert"], ["convert", "dataset_coco.json"]):
        with pytest.raises(SystemExit, match="2"):
            prepare.main(wrong)


# ---------------------------------------------------------------- --check

SMALL = {"vit": "nano", "image_size": 32, "embed_dim": 16, "batch_size_train": 6, "queue_size": 6, "num_workers": 0}


@pytest.fixture
def layout(source, tmp_path, monkeypatch):
    """A folder as COCO's, of five images, and its config; the published counts are made to fit."""
    assert prepare.main(["convert", source(COCO), str(tmp_path / "coco" / "annotation")]) == 0
    for entry in COCO["images"]:
        path = tmp_path / "coco" / entry["filepath"] / entry["filename"]
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(40 * entry["cocoid"]).resize((30, 30)).save(path)
    counts = {"train": (3, 15), "val": (1, 5), "test": (1, 6)}
    monkeypatch.setitem(DATASETS, "coco", replace(DATASETS["coco"], counts=counts))

    def no_network(request, timeout):
        raise URLError("no network")

    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    roots = {"image_root": str(tmp_path / "coco"), "ann_root": str(tmp_path / "coco" / "annotation")}
    YAML().dump({"dataset": "coco"} | roots | SMALL, tmp_path / "coco.yaml")
    return tmp_path / "coco"


def check(folder, capsys, *pairs: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `--check`."""
    capsys.readouterr()
    args = ["--config", f"{folder}.yaml", "--output_dir", str(folder / "out"), "--device", "cpu", "--check"]
    status = train_retrieval.main([*args, *(["--set", *pairs] if pairs else [])])
    return status, *capsys.readouterr()


def test_a_whole_layout_is_all_good(layout, capsys):
    status, out, err = check(layout, capsys)
    assert (status, err) == (0, "")
    assert "coco train: 3 images, 15 captions, as published" in out and out.endswith("all good\n")
    assert "all 3 images are under" in out and "< 64: 3" in out


def test_missing_and_broken_images_are_named_with_their_source(layout, capsys):
    (layout / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    (layout / "val2014" / "COCO_val2014_000000000004.jpg").write_bytes(b"broken")
    (layout / "annotation" / "coco_karpathy_test.json").unlink()
    status, _, err = check(layout, capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 3
    assert "coco_karpathy_test.json is missing" in errors[0] and "convert dataset_coco.json" in errors[0]
    assert "coco train: 1 of 1 images of val2014 are missing" in errors[1] and "zips/val2014.zip" in errors[1]
    assert "the first is val2014/COCO_val2014_000000000002.jpg" in errors[1]
    assert "1 of 1 images are unreadable: image val2014/COCO_val2014_000000000004.jpg" in errors[2]


def test_every_folder_is_named_and_other_images_too(layout, capsys):
    for path in layout.glob("*2014/*.jpg"):
        path.unlink()
    rows = json.loads((layout / "annotation" / "coco_karpathy_val.json").read_text())
    rows[0]["image"] = "elsewhere/1.jpg"
    (layout / "annotation" / "coco_karpathy_val.json").write_text(json.dumps(rows))
    status, _, err = check(layout, capsys)
    assert status == 2
    expected = [
        ("coco train: 2 of 2 images of train2014 are missing", "unpack http://images.cocodataset.org/zips/train2014"),
        ("coco train: 1 of 1 images of val2014 are missing", "unpack http://images.cocodataset.org/zips/val2014"),
        ("coco val: 1 of 1 images are missing", "the first is elsewhere/1.jpg: set image_root"),
        ("coco test: 1 of 1 images of val2014 are missing", "unpack http://images.cocodataset.org/zips/val2014"),
    ]
    for line, parts in zip(err.splitlines(), expected, strict=True):
        assert line.startswith("error: ") and [part for part in parts if part not in line] == [], line


def test_other_counts_and_other_folders_are_errors(layout, source, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "coco", replace(DATASETS["coco"], counts={"train": (113287, 566747)}))
    status, out, err = check(layout, capsys)
    assert status == 2 and "coco train: 3 images, 15 captions, 3 ids" in out and "as published" not in out
    assert "3 images and 15 captions, not the published 113,287 and 566,747: Recall cannot be compared" in err
    cfg = load_config(f"{layout}.yaml")
    found = check_data(cfg, {"train": load_annotations(cfg, "train")})  # of a run, which may be on purpose
    assert found.errors == [] and "not the published 113,287 and 566,747" in found.warnings[0]
    status, _, err = check(layout, capsys, "dataset=flickr", f"image_root={tmp_path / 'none'}")
    assert status == 2 and "University of Illinois" in err and "flickr30k_val.json is missing" in err
    assert "convert dataset_flickr30k.json" in err
    status, _, err = check(layout, capsys, f"image_root={tmp_path / 'none'}")
    assert status == 2 and err.count("zips/train2014.zip") == 1 and "Its folders: train2014/: unpack" in err


def test_published_counts_are_blips():
    assert DATASETS["coco"].counts == {"train": (113287, 566747), "val": (5000, 25010), "test": (5000, 25010)}
    assert DATASETS["flickr"].counts == {"train": (29000, 145000), "val": (1014, 5070), "test": (1000, 5000)}
