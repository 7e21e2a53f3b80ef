"""Bad input of every kind through the program: one paragraph that names the culprit, exit status 2, nothing written."""

import io
import json
import pickle
import re
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_retrieval
from configs.schema import load_config
from data import images
from models.blip_retrieval import build_model
from tests.test_annotations import BAD_CSV, BAD_FILES
from tests.test_dialects import REFUSED
from training import recipe


def run(folder: Path, *args: str) -> int:
    config = [] if "--config" in args else ["--config", str(folder / "config.yaml")]
    return train_retrieval.main([*config, "--output_dir", str(folder / "out"), "--device", "cpu", *args])


# ---- what is made bad: functions of the run's folder, which return the arguments ------------------------------------


def options(*pairs: str, flags: tuple[str, ...] = ()):
    return lambda folder, patch: [*flags, "--set", *(pair.format(folder) for pair in pairs)]


def config(text: str | bytes):
    def write(folder: Path, patch) -> list[str]:
        (folder / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(folder / "bad.yaml")]

    return write


def med(content: str | dict):
    def write(folder: Path, patch) -> list[str]:
        values = json.loads((folder / "med.json").read_text())
        text = content if isinstance(content, str) else json.dumps(values | content)
        (folder / "med.json").write_text(text)
        return []

    return write


def train_file(text: str | bytes, name: str = "train.json"):
    def write(folder: Path, patch) -> list[str]:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--set", f"train_file={name}"]

    return write


def row(**changes):
    """The third training row with other values; None removes a key."""

    def write(folder: Path, patch) -> list[str]:
        rows = json.loads((folder / "train.json").read_text())
        rows[2] = {key: value for key, value in (rows[2] | changes).items() if value is not None}
        (folder / "train.json").write_text(json.dumps(rows))
        return []

    return write


def image(data: bytes | None, *args: str, name: str = "train_3.png"):
    def write(folder: Path, patch) -> list[str]:
        (folder / "images" / name).unlink()
        if data is not None:
            (folder / "images" / name).write_bytes(data)
        return [*args]

    return write


def jpeg(side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def folder_as_image(folder: Path, patch) -> list[str]:
    (folder / "images" / "train_3.png").unlink()
    (folder / "images" / "train_3.png").mkdir()
    return []


def bomb(folder: Path, patch) -> list[str]:
    Image.new("1", (9500, 9500)).save(folder / "images" / "train_3.png")  # 90 million pixels in a small file
    return []


def broken_train_images(folder: Path, patch) -> list[str]:
    for path in (folder / "images").glob("train_*"):
        path.write_bytes(b"broken")
    return ["--set", "on_bad_sample=skip"]


def same_image_id(folder: Path, patch) -> list[str]:
    rows = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps([row | {"image_id": "same"} for row in rows]))
    return []


def archive(change):
    """image_root as a .zip of the images under changed names."""

    def write(folder: Path, patch) -> list[str]:
        with zipfile.ZipFile(folder / "images.zip", "w") as file:
            for path in (folder / "images").iterdir():
                file.write(path, change(path.name))
        return ["--set", f"image_root={folder / 'images.zip'}"]

    return write


def cut_archive(folder: Path, patch) -> list[str]:
    args = archive(lambda name: name)(folder, patch)
    data = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(data[: len(data) // 2])
    return args


def archive_bomb(folder: Path, patch) -> list[str]:
    patch.setattr(images, "MAX_BYTES", 3000)
    return archive(lambda name: name)(folder, patch)


def climbing_archive(folder: Path, patch) -> list[str]:
    row(image="../train_1.png")(folder, patch)
    return archive(lambda name: f"../{name}" if name == "train_1.png" else name)(folder, patch)


def checkpoint(change=None, data: bytes | None = None, **other):
    """`pretrained`: weights of the run's own model, of another size (`other`), changed, or plain bytes."""

    def write(folder: Path, patch) -> list[str]:
        path = folder / "weights.pth"
        if data is not None:
            path.write_bytes(data)
        else:
            cfg = load_config(folder / "config.yaml", {k: str(v) for k, v in other.items()})
            saved = {"model": build_model(cfg).state_dict()}
            torch.save(change(saved) if change else saved, path)
        return ["--set", f"pretrained={path}"]

    return write


def cut_checkpoint(folder: Path, patch) -> list[str]:
    args = checkpoint()(folder, patch)
    data = (folder / "weights.pth").read_bytes()
    (folder / "weights.pth").write_bytes(data[: len(data) // 2])
    return args


def wrong_sum(folder: Path, patch) -> list[str]:
    (folder / "weights.pth.sha256").write_text("0" * 64)
    return checkpoint()(folder, patch)


def without_temp(saved: dict) -> dict:
    del saved["model"]["temp"]
    return saved


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def full_disk(folder: Path, patch) -> list[str]:
    usage = namedtuple("usage", "total used free")
    patch.setattr(recipe.shutil, "disk_usage", lambda path: usage(100, 99, 1))
    return []


def out_is_a_file(folder: Path, patch) -> list[str]:
    (folder / "file").touch()
    return ["--output_dir", str(folder / "file" / "run")]


def no_train_file(folder: Path, patch) -> list[str]:
    return ["--set", "train_file="]


GOOD = '{"image": "train_0.png", "caption": "a"}'
BAD = {
    # configs
    "unknown key": (options("qeue_size=24"), ["qeue_size", "queue_size"]),
    "a text for a number": (options("k_test=many"), ["k_test", "many"]),
    "a fraction for a whole number": (options("max_epoch=1.5"), ["max_epoch", "1.5"]),
    "out of range": (options("momentum=1.5"), ["momentum", "1.5"]),
    "not a number": (options("init_lr=.nan"), ["init_lr", "nan"]),
    "unknown data set": (options("dataset=custm"), ["dataset", "custom"]),
    "unknown vit": (options("vit=gigantic"), ["vit", "gigantic", "large"]),
    "image size": (options("image_size=40", "patch_size=16"), ["image_size 40", "patch_size 16"]),
    "min_lr above": (options("min_lr=0.5"), ["min_lr", "init_lr"]),
    "small queue": (options("queue_size=6"), ["queue_size 6", "8"]),
    "batch over ranks": (options("global_batch_size=9"), ["global_batch_size 9", "ranks_emulated 2"]),
    "batch of one": (options("global_batch_size=2"), ["global_batch_size 2", "negative"]),
    "batch above the set": (options("global_batch_size=48", "queue_size=48"), ["train.json", "24", "fill one"]),
    "set without =": (options("k_test"), ["--set k_test", "key=value"]),
    "set of no YAML": (options("k_test=[1"), ["--set k_test=[1", "YAML"]),
    "no config": (lambda folder, patch: ["--config", str(folder / "none.yaml")], ["none.yaml", "--config"]),
    "config is a folder": (lambda folder, patch: ["--config", str(folder)], ["directory"]),
    "config is no YAML": (config("dataset: [coco\nk_test: 3"), ["bad.yaml", "line 2"]),
    "config is a list": (config("- dataset\n- coco"), ["bad.yaml", "list"]),
    "config is empty": (config(""), ["bad.yaml", "empty"]),
    "config repeats a key": (config("dataset: coco\ndataset: flickr\n"), ["bad.yaml", "line 2", "dataset"]),
    "config lacks a key": (config("image_root: x\n"), ["bad.yaml", "dataset"]),
    "config is binary": (config(b"\xff\xfe\x00\x01"), ["bad.yaml", "UTF-8"]),
    "files of another data set": (options("dataset=coco"), ["train_file", "custom"]),
    "device": (lambda folder, patch: ["--device", "tpu"], ["--device tpu", "cpu"]),
    "cuda without one": (lambda folder, patch: ["--device", "cuda"], ["--device cuda"]),
    "config of LAVIS": (config("model: {vit_type: base}\ndatasets: {coco: 1}\nrun: {max_epoch: 6}\n"),
                        ["bad.yaml", "LAVIS", "configs/retrieval_coco.yaml", "max_epoch: 6"]),
    # text encoder
    "no med_config": (options("med_config=absent.json"), ["med_config", "absent.json"]),
    "med_config is a folder": (options("med_config={}"), ["directory"]),
    "med_config is no JSON": (med("{hidden"), ["med.json", "JSON"]),
    "med_config unknown key": (med({"hiden_size": 3}), ["med.json", "hiden_size"]),
    "med_config heads": (med({"num_attention_heads": 5}), ["med.json", "num_attention_heads 5"]),
    "med_config of texts": (med({"num_hidden_layers": "two"}), ["med.json", "num_hidden_layers", "whole number"]),
    # annotations
    "no annotations": (options("train_file=none.json"), ["none.json", "ann_root"]),
    "empty annotations": (train_file("[]"), ["train.json", "no rows"]),
    "cut annotations": (train_file(f"[{GOOD}, "), ["train.json", "too early"]),
    "web page": (train_file("<!DOCTYPE html><html>"), ["train.json", "HTML"]),
    "one object": (train_file('{"images": []}'), ["train.json", "images"]),
    "not UTF-8": (train_file(GOOD.replace("a", "ä", 1).encode("latin-1")), ["train.json", "UTF-8"]),
    "bad line": (train_file(f"{GOOD}\n{GOOD}\nnonsense\n", "a.jsonl"), ["a.jsonl", "row 3"]),
    "CSV without a column": (train_file("image,words\na.png,a\n", "a.csv"), ["a.csv", "'caption'"]),
    "CSV with a comma": (train_file("image,caption\na.png,a\nb.png,a, b\n", "a.csv"), ["a.csv", "row 2"]),
    "no image key": (row(image=None), ["train.json, row 3", "'image'"]),
    "no caption key": (row(caption=None), ["train.json, row 3", "'caption'"]),
    "caption a number": (row(caption=3), ["train.json, row 3", "'caption'", "3"]),
    "caption empty": (row(caption=["a", " "]), ["train.json, row 3", "empty"]),
    "image_id a list": (row(image_id=[1]), ["train.json, row 3", "'image_id'"]),
    "two ids of an image": (row(image="train_1.png"), ["train.json, row 3", "train_1.png", "row 2"]),
    "absolute path": (row(image="/etc/passwd"), ["train.json, row 3", "/etc/passwd"]),
    "path upwards": (row(image="../../secret.png"), ["train.json, row 3", "../../secret.png"]),
    "path upwards, Windows": (row(image="..\\secret.png"), ["train.json, row 3", "'..'"]),
    "path with a null byte": (row(image="a\0.png"), ["train.json, row 3"]),
    "one image_id": (same_image_id, ["train.json", "epoch 0, step 0", "same image"]),
    "too few to split": (options("train_file=val.json", "val_file=", "test_file="), ["val.json", "too few"]),
    "no train_file": (no_train_file, ["train_file"]),
    # images and archives
    "no image_root": (options("image_root=/nowhere/images"), ["image_root /nowhere/images"]),
    "empty image_root": (options("image_root="), ["image_root is empty"]),
    "missing image": (image(None), ["1 of 12", "train_3.png"]),
    "no image": (image(b"not a picture"), ["train_3.png", "not an image"]),
    "empty image": (image(b""), ["train_3.png"]),
    "cut image": (image(jpeg()[:900]), ["train_3.png", "truncated"]),
    "folder as image": (folder_as_image, ["train_3.png", "directory"]),
    "pixel bomb": (bomb, ["train_3.png", "too large"]),
    "val image, skipping": (image(b"", "--set", "on_bad_sample=skip", name="val_1.png"), ["custom val", "val_1.png"]),
    "all images, skipping": (broken_train_images, ["custom train", "12 of 12"]),
    "no archive": (options("image_root={}/config.yaml"), ["image_root", "config.yaml"]),
    "archive is none": (lambda folder, patch: shutil.copy(folder / "med.json", folder / "a.zip") and
                        ["--set", f"image_root={folder / 'a.zip'}"], ["a.zip", "archive"]),
    "cut archive": (cut_archive, ["images.zip", "archive"]),
    "archive with a leading folder": (archive(lambda name: f"flat/{name}"), ["12 of 12", "train_0.png", " flat/"]),
    "archive that climbs": (climbing_archive, ["train.json, row 3", "../train_1.png"]),
    "archive bomb": (archive_bomb, ["unpacks to", "too large"]),
    # checkpoints
    "no checkpoint": (options("pretrained=none.pth"), ["none.pth"]),
    "misspelt checkpoint": (options("pretrained=model_bse.pth"), ["model_bse.pth", "model_base.pth"]),
    "empty checkpoint": (checkpoint(data=b""), ["weights.pth", "empty"]),
    "web page as checkpoint": (checkpoint(data=b"<!doctype html>"), ["weights.pth", "web page"]),
    "pointer as checkpoint": (checkpoint(data=b"version https://git-lfs.github.com/spec/v1"), ["weights.pth", "LFS"]),
    "random bytes": (checkpoint(data=bytes(range(256))), ["weights.pth", "checkpoint"]),
    "cut checkpoint": (cut_checkpoint, ["weights.pth", "cut short"]),
    "code in a checkpoint": (checkpoint(data=pickle.dumps({"model": Trap()})), ["weights.pth"]),
    "no weights": (checkpoint(lambda saved: {"model": {"a": 1}}), ["weights.pth", "no weights"]),
    "another model": (checkpoint(lambda saved: {"a": torch.ones(2)}), ["weights.pth", "retrieval"]),
    "lacks a tensor": (checkpoint(without_temp), ["weights.pth", "lacks 1 tensors: temp"]),
    "another vit": (checkpoint(vit="tiny"), ["weights.pth", "vit: tiny"]),
    "another embed_dim": (checkpoint(embed_dim=24), ["weights.pth", "embed_dim: 24"]),
    "wrong check sum": (wrong_sum, ["weights.pth", "SHA-256"]),
    "bad finetuned": (options("finetuned=none.pth", flags=("--evaluate",)), ["none.pth"]),
    "resume from nothing": (lambda folder, patch: ["--resume", "none.pth"], ["none.pth"]),
    "resume from weights": (lambda folder, patch: checkpoint()(folder, patch) and
                            ["--resume", str(folder / "weights.pth")], ["weights.pth", "not the save of a run"]),
    # disk
    "full disk": (full_disk, ["too full", "keep_last"]),
    "output in a file": (out_is_a_file, ["--output_dir", "not a folder"]),
}  # fmt: skip


for number, (text, said) in enumerate(BAD_FILES.values()):
    text = text if isinstance(text, str) else json.dumps(text)
    BAD[f"annotations {number}"] = (train_file(text, "bad.json"), ["bad.json"], said)
for number, (text, said) in enumerate(BAD_CSV.values()):
    BAD[f"table {number}"] = (train_file(text, "bad.csv"), ["bad.csv"], said)
for name, (text, said) in REFUSED.items():
    BAD[f"dialect {name}"] = (train_file(text, name), [name], said)


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tiny_run, capsys, monkeypatch, name):
    change, expected, *pattern = BAD[name]
    monkeypatch.chdir(tiny_run)
    args = change(tiny_run, monkeypatch)
    before = contents(tiny_run)
    assert run(tiny_run, *args) == 2
    *log, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "Traceback" not in str(log)
    assert not log or "--resume" in args  # all but a save to resume is looked at before anything is said
    assert [word for word in expected if word not in error] == [], error
    assert not pattern or re.search(pattern[0], error)
    assert len(error) < 1500
    assert contents(tiny_run) == before


def test_check_finds_the_same_and_writes_nothing(tiny_run, capsys, monkeypatch):
    """Several mistakes at once: each is a paragraph."""
    for change in (row(caption=3), image(b"", name="val_1.png"), checkpoint(vit="tiny")):
        args = change(tiny_run, monkeypatch)
    before = contents(tiny_run)
    assert run(tiny_run, *args, "--check") == 2
    errors = capsys.readouterr().err.splitlines()
    assert contents(tiny_run) == before
    for word in ("train.json, row 3", "val_1.png", "vit: tiny"):
        assert sum(line.startswith("error: ") and word in line for line in errors) == 1, errors


def test_there_are_enough_of_them():
    assert len(BAD) >= 150
