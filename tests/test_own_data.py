"""The walk-through "Your own data" of docs/data.md: ten images drawn here, a small config, and the page's commands."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

import train_retrieval
from configs.schema import load_config
from data.annotations import load_annotations
from data.images import open_store
from tests.test_train import ROOT, lines

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("\n## Your own data\n")[2]
COLOURS = ("red", "blue", "green", "yellow", "black")
SHAPES = ("circle", "square")


def draw_ten(folder: Path) -> list[dict]:
    """Five colours of two shapes in `folder`/images, and their rows."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            picture = Image.new("RGB", (64, 64), "white")
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "circle" else draw.rectangle)((16, 16, 48, 48), fill=colour)
            picture.save(folder / "images" / f"{colour}_{shape}.png")
            captions = [f"A {colour} {shape}.", f"a {shape} in {colour}"]
            rows.append({"image": f"{colour}_{shape}.png", "caption": captions})
    return rows


SMALL = {
    "dataset": "custom", "pretrained": "", "vit": "nano", "patch_size": 16, "image_size": 64,
    "med_config": "configs/med_small.json", "embed_dim": 32, "augment": False, "num_workers": 0,
    "batch_size_train": 6, "queue_size": 6, "max_epoch": 2, "init_lr": 1e-3,
}  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The walk-through's files, and its working directory."""
    folder = tmp_path / "datasets" / "mine"
    (folder / "train.json").parent.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(draw_ten(folder)))
    root = {"image_root": "datasets/mine/images", "ann_root": "datasets/mine", "train_file": "train.json"}
    YAML().dump(SMALL | root, tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    return folder


def run(*args: str) -> int:
    return train_retrieval.main(["--config", "mine.yaml", "--output_dir", "output/mine", "--device", "cpu", *args])


def page_commands() -> list[list[str]]:
    """Arguments of the page's commands on `mine.yaml` and the run's own config, in order."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if re.search("mine(.yaml|/config.yaml)", line)]
    return [command[command.index("train_retrieval.py") + 1 :] + ["--device", "cpu"] for command in commands]


def test_the_page_shows_these_annotations():
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    rows = [{"image": f"red_{shape}.png", "caption": [f"A red {shape}.", f"a {shape} in red"]} for shape in SHAPES]
    assert json.loads(example) == rows


def test_the_walk_through(mine, capsys):
    check, train, evaluate = page_commands()
    assert train_retrieval.main(check) == 0
    out, err = capsys.readouterr()
    (printed,) = re.findall(r"```\n(datasets/mine.*?)```", PAGE, re.DOTALL)
    for line in printed.splitlines():
        assert line == "..." or line in out + err
    assert "split by image with seed 0, as there is no file for test or val: 6 train, 2 test, 2 val" in err
    assert "custom train: 6 images, 12 captions, 6 ids (datasets/mine/train.json)" in out
    assert "2 steps an epoch of 6 pairs, 4 steps in all" in out and out.endswith("all good\n")
    assert not Path("output").exists()

    assert train_retrieval.main(train) == 0
    err = capsys.readouterr().err
    assert "epoch 1 [2/2]" in err and "the best epoch was" in err
    before, *epochs, test = lines(Path("output/mine/log.txt"))
    assert [before["epoch"], *(line["epoch"] for line in epochs)] == [-1, 0, 1]
    assert test["test_chance_txt_r1"] == 50  # 2 of 4 captions are right

    assert train_retrieval.main(evaluate) == 0
    (evaluated,) = lines(Path("output/mine/evaluate.txt"))
    assert evaluated["test_r_mean"] == test["test_r_mean"]


def test_every_format_and_an_archive_hold_the_same(mine):
    rows = json.loads((mine / "train.json").read_text())
    (mine / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(mine / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([row["image"], caption] for row in rows for caption in row["caption"])
    shutil.make_archive(str(mine / "images"), "zip", mine / "images")
    expected = load_annotations(load_config("mine.yaml"), "test")
    for name in ("train.jsonl", "train.csv"):
        cfg = load_config("mine.yaml", {"train_file": name, "image_root": "datasets/mine/images.zip"})
        found = load_annotations(cfg, "test")
        assert (found.images, found.captions) == (expected.images, expected.captions)
        assert open_store(cfg).missing(found.images) == []
        assert run("--check", "--set", f"train_file={name}", "image_root=datasets/mine/images.zip") == 0


def test_images_of_one_image_id_are_right_answers_for_each_other(mine, capsys):
    """Circle and square of a colour share their id: all four captions are right for both."""
    rows = [row | {"image_id": row["image"].split("_")[0]} for row in json.loads((mine / "train.json").read_text())]
    (mine / "train.json").write_text(json.dumps(rows[:6]))
    (mine / "held_out.json").write_text(json.dumps(rows[6:]))
    args = ["--set", "val_file=held_out.json", "test_file=held_out.json", "max_epoch=1"]
    assert run(*args) == 0
    test = lines(Path("output/mine/log.txt"))[-1]
    assert test["test_chance_txt_r1"] == test["test_chance_img_r1"] == 50  # 4 of 8 captions, 2 of 4 images
    assert "4 of 4 images are also in custom val" in capsys.readouterr().err


def test_a_test_file_alone_can_be_evaluated(mine):
    (mine / "train.json").rename(mine / "test.json")
    assert run("--evaluate", "--random_weights", "--set", "train_file=", "test_file=test.json") == 0
    (result,) = lines(Path("output/mine/evaluate.txt"))
    assert "test_r_mean" in result and "val_r_mean" not in result
    assert run("--set", "train_file=", "test_file=test.json") == 2


def test_the_template_loads_with_these_files(mine, capsys, monkeypatch):
    """configs/retrieval_custom.yaml, its checkpoint not there yet; ten images are far below its batch."""
    args = ["--config", str(ROOT / "configs" / "retrieval_custom.yaml"), "--check", "--device", "cpu"]
    args += ["--set", "image_root=datasets/mine/images", "cache_dir=."]
    assert train_retrieval.main(args) == 2
    out, err = capsys.readouterr()
    assert "custom train: 6 images, 12 captions" in out and "model_base.pth: not here yet" in out
    assert "12 training captions do not fill one global batch of 64" in err
