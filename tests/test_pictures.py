"""reports/pictures.py: what it draws is what an independent ranking says, and the same each time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import train_retrieval
from checkpoints.runs import save_checkpoint
from configs.schema import load_config, save_config
from data.annotations import load_annotations
from data.images import open_store
from models.blip_retrieval import build_model
from reports import pictures
from reports.pictures import Answer, draw, draw_captions, main
from retrieval import features
from retrieval.rerank import score_matrices
from transform.image import eval_transform


def save_run_folder(tiny_run: Path) -> Path:
    """A run of random weights, matching far from constant."""
    cfg = load_config(tiny_run / "config.yaml")
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    run = tiny_run / "output" / "mine"
    save_checkpoint(run / "checkpoint_best.pth", model, torch.optim.SGD(model.parameters()), {}, 0)
    save_config(cfg, run / "config.yaml")
    return run


def frame(sheet: Image.Image, row: int, place: int) -> tuple[int, ...]:
    """Colour just outside the left edge of a picture."""
    x = pictures.MARGIN + pictures.TEXT_WIDTH + pictures.GAP + place * pictures.COLUMN - 1
    return sheet.getpixel((x, pictures.HEAD + row * pictures.ROW + pictures.GAP + pictures.SIDE // 2))


def test_right_answers_are_framed_where_evaluation_ranks_them(tiny_run, tmp_path, capsys):
    run, out = save_run_folder(tiny_run), tmp_path / "docs" / "pictures"
    assert main([str(run), str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{out / 'mine.png'}\n"
    sheet = Image.open(out / "mine.png")
    assert sheet.size == (pictures.WIDTH, pictures.HEAD + 3 * pictures.ROW) and 1050 <= pictures.WIDTH <= 1150

    cfg = load_config(run / "config.yaml")
    split, store = load_annotations(cfg, "test"), open_store(cfg)
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(run / "checkpoint_best.pth", weights_only=True)["model"])
    images = torch.stack([eval_transform(32)(store.load(name)) for name in split.images])
    _, t2i = score_matrices(model, images, split.captions, cfg.k_test)
    seen = []
    for row, caption in enumerate(draw_captions(split, 3, seed=3)):
        ranked = t2i[caption].argsort(descending=True).tolist()
        colours = [frame(sheet, row, place) for place in range(len(ranked))]
        right = [split.image_ids[i] == split.caption_ids[caption] for i in ranked]
        assert colours == [pictures.GREEN if is_right else pictures.GREY for is_right in right]
        seen += [right.index(True)]
    assert len(set(seen)) > 1  # right answers at different places


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(tiny_run, tmp_path):
    run = save_run_folder(tiny_run)
    drawn = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([str(run), str(tmp_path / folder), "--seed", seed]) == 0
        drawn.append((tmp_path / folder / "mine.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_chunks_change_nothing(tiny_run, tmp_path, monkeypatch):
    run = save_run_folder(tiny_run)
    main([str(run), str(tmp_path / "a")])
    monkeypatch.setattr(features, "CHUNK", 3)
    main([str(run), str(tmp_path / "b")])
    sheets = [Image.open(tmp_path / folder / "mine.png") for folder in "ab"]
    assert ImageChops.difference(*sheets).getbbox() is None


def test_captions_are_of_different_pictures(tiny_run):
    split = load_annotations(load_config(tiny_run / "config.yaml"), "test")
    drawn = [draw_captions(split, 3, seed) for seed in range(20)]
    assert all(len(set(split.caption_image[captions])) == 3 for captions in drawn)
    assert len({caption for captions in drawn for caption in captions}) == len(split.captions)
    assert len(draw_captions(split, 99, 0)) == len(split.images)


def test_long_sentences_and_pictures_of_any_shape_stay_in_their_places():
    images = [Image.new("RGB", size, "blue") for size in ((400, 20), (20, 400), (7, 7), (900, 900), (161, 160))]
    query = Answer(" ".join(["eightlet"] * 29 + ["w" * 40]), [0, 1, 2, 3, 4], [False] * 5, [0.5] * 5, [0.5] * 5, 0)
    pixels = np.asarray(draw("title", [query], [images]))
    left = pictures.MARGIN + pictures.TEXT_WIDTH + pictures.GAP
    blue = (pixels[..., 2] > 200) & (pixels[..., 0] < 50)  # of the pictures
    rows, columns = np.nonzero(blue)
    assert rows.min() >= pictures.HEAD + pictures.GAP and rows.max() < pictures.HEAD + pictures.GAP + pictures.SIDE
    assert columns.min() >= left and columns.max() < pictures.WIDTH - pictures.MARGIN
    bottom = pictures.HEAD + pictures.GAP + pictures.SIDE
    between = pixels[bottom : bottom + 8, : left - pictures.GAP]  # the sentence ends above it, the place is below
    assert (between == 255).all() and (pixels[bottom - 60 : bottom, : left - pictures.GAP] < 255).any()


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.yaml: cannot read the config")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_of_the_program_is_drawn(tiny_run, tmp_path):
    run = tmp_path / "output" / "tiny"
    assert train_retrieval.main(["--config", str(tiny_run / "config.yaml"), "--output_dir", str(run)]) == 0
    assert main([str(run), str(tmp_path / "out")]) == 0 and (tmp_path / "out" / "tiny.png").stat().st_size > 1000
