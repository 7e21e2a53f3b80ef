"""What a run, and `--check`, say beforehand; what training warns of; broken images on the way."""

import json
import logging
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.runs import RunState, save_run, size_of_save
from configs.schema import RetrievalConfig, load_config
from data import findings, image_checks
from data.annotations import Annotations
from data.caption_checks import check_captions, read
from models.blip_retrieval import build_model
from models.freezing import train_less
from retrieval import evaluate
from retrieval.metrics import within_noise
from tests.test_train import ROOT, lines, run
from training import loop
from training.monitor import TrainingWarnings
from training.recipe import check_disk, check_recipe, require_negatives
from training.schedule import build_optimizer
from transform.text import blip_tokenizer, clean_caption


def check(folder, capsys, *pairs: str) -> str:
    assert run(folder, "--check", *(["--set", *pairs] if pairs else [])) == 0
    return capsys.readouterr().out


def edit(path, change) -> None:
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


def table(ids, name="custom train", captions=None) -> Annotations:
    ids = np.array(ids)
    captions = captions or [f"caption {i}" for i in range(len(ids))]
    images = [f"{i}.png" for i in range(len(ids))]
    return Annotations(name, [ROOT / "rows.json"], images, ids, captions, np.arange(len(ids)))


# ---------------------------------------------------------------- --check


def test_a_good_run_is_all_good_and_nothing_is_written(tiny_run, capsys):
    before = sorted(tiny_run.rglob("*"))
    report = check(tiny_run, capsys, "queue_size=8")
    assert report.endswith("all good\n") and "warning" not in report
    assert f"custom train: 12 images, 24 captions, 12 ids ({tiny_run / 'train.json'})" in report
    assert "custom test: images by their shorter side in pixels: < 64: 4" in report
    assert "3 steps an epoch of 8 pairs, 6 steps in all" in report and "checkpoints of" in report
    assert sorted(tiny_run.rglob("*")) == before


def test_a_run_looks_at_a_sample_and_says_so(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(image_checks, "QUICK_IMAGES", 4)  # of 12: every third
    (tiny_run / "images" / "train_3.png").write_bytes(b"")
    assert run(tiny_run) == 2
    error = capsys.readouterr().err
    assert "1 of 4 images looked at (--check looks at all)" in error and "train_3.png" in error


def long_caption(rows):
    rows[0]["caption"] = ["word " * 31, "extraordinarilyunpronounceable " * 10]


WARNINGS = {
    "queue": ((), None, "queue_size 24 is large for 24 training pairs.*set queue_size to 8"),
    "workers": (("num_workers=999",), None, "num_workers 999 makes 999 loaders on"),
    "long": ((), long_caption, "1 of 24 captions have more than 30 words"),
    "tokens": ((), long_caption, "1 of 24 captions have more than 35 tokens"),
    "twice": ((), lambda rows: rows + rows[:2], "4 of 28 captions repeat"),
    "one id": ((), lambda rows: [row | {"image_id": max(i, 6)} for i, row in enumerate(rows)], "58 % of the captions"),
    "not English": ((), lambda rows: [row | {"caption": "🐶 🐱 dog"} for row in rows], "67 % of the word pieces"),
    "same file": ((), lambda rows: rows + [{"image": "test_1.png", "caption": "x"}], "1 of 4 images are also in"),
    "captions": ((), lambda rows: rows[0].update(caption="a dog"), "2 of 8 captions are word for word also"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_one_line_with_the_remedy(tiny_run, capsys, name):
    pairs, change, said = WARNINGS[name]
    if change:
        edit(tiny_run / "train.json", change)
    edit(tiny_run / "test.json", lambda rows: rows[1].update(caption=["a dog", "a dog"]))
    report = check(tiny_run, capsys, *pairs).splitlines()
    (warning,) = [line for line in report if line.startswith("warning: ") and re.search(said, line)]
    assert ": " in warning.removeprefix("warning: custom train: ") and len(warning) < 400  # a remedy follows


def test_copies_under_other_names_are_found_by_their_bytes(tiny_run, capsys):
    shutil.copy(tiny_run / "images" / "train_2.png", tiny_run / "images" / "test_0.png")
    assert "1 of 4 images are, under other names, copies of images of custom train (the first: test_0.png)" in check(
        tiny_run, capsys
    )


def test_a_finetuned_checkpoint_is_told_from_a_pretrained_one(tiny_run, capsys):
    state = build_model(load_config(tiny_run / "config.yaml")).state_dict()
    path = tiny_run / "weights.pth"
    torch.save({"model": state}, path)
    assert "is a BLIP already fine-tuned for retrieval" in check(tiny_run, capsys, f"pretrained={path}")
    torch.save({"model": {**state, "text_decoder.x": torch.ones(1)}}, path)
    report = check(tiny_run, capsys, f"pretrained={path}")
    assert "weights.pth: pre-trained BLIP" in report and "already" not in report
    address = "https://example.org/x/model_nowhere.pth"
    assert f"{address}: not here yet" in check(tiny_run, capsys, f"pretrained={address}")
    assert f"{address}: not here yet, so neither its sizes" in check(
        tiny_run, capsys, f"pretrained={address}", "vit=auto"
    )


def test_pixels_that_show_nothing_are_counted_and_named(tiny_run, capsys):
    images = tiny_run / "images"
    alpha = np.zeros((40, 40, 4), np.uint8)
    alpha[10:20, 10:20, 3] = 255
    Image.fromarray(alpha, "RGBA").save(images / "train_0.png")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(images / "train_1.png")
    Image.new("RGB", (40, 40), (7, 8, 9)).save(images / "train_2.png")
    Image.open(images / "train_3.png").save(images / "train_4.png", compress_level=0)
    Image.new("RGB", (40, 40), (7, 8, 9)).save(images / "test_0.png", compress_level=0)
    report = check(tiny_run, capsys, "queue_size=8")
    assert "warning: custom train: 2 of 12 images are of one colour, or nearly (train_0.png, train_2.png); " in report
    assert "1 have an alpha channel, which BLIP drops: set flatten_alpha to white" in report
    assert "1 of 12 images have at most 16 grey levels (train_1.png); 1 have more than 8 bits: set grey_bits" in report
    assert "2 of 12 images have the pixels of another one (train_3.png, train_4.png), with another image_id" in report
    assert "1 of 4 images are, under other names, copies of images of custom train (the first: test_0.png)" in report
    report = check(tiny_run, capsys, "queue_size=8", "flatten_alpha=white", "grey_bits=11")
    assert "1 of 12 images are of one colour, or nearly (train_2.png): look at them" in report
    assert "alpha" not in report and "grey_bits" not in report
    report = check(tiny_run, capsys, "queue_size=8", "flatten_alpha=white", "grey_bits=10")
    assert "1 of 12 images have more than 8 bits, and over 20 % of their pixels are white (train_1.png)" in report


LANGUAGES = {
    "Russian": ["Мужчина в красной рубашке едет на лошади", "Две собаки играют с мячом в снегу"],
    "Arabic": ["رجل يرتدي قميصا أحمر يركب حصانا", "كلبان يلعبان بالكرة في الثلج"],
    "Hindi": ["लाल कमीज में एक आदमी घोड़े की सवारी करता है", "दो कुत्ते बर्फ में खेलते हैं"],
    "Vietnamese": ["Một người đàn ông mặc áo đỏ cưỡi ngựa", "Hai con chó chơi với quả bóng trong tuyết"],
    "Thai": ["ผู้ชายใส่เสื้อสีแดงขี่ม้า", "สุนัขสองตัวเล่นลูกบอล"],
    "Chinese": ["一个穿红衬衫的男人在海滩上骑马", "两只狗在雪地里玩球"],
    "German": ["Ein Mann in einem roten Hemd reitet auf einem Pferd am Strand"],
    "French": ["Un homme en chemise rouge monte à cheval", "Deux chiens jouent avec un ballon dans la neige"],
    "English": ["A man in a red shirt rides a horse on the beach", "Two dogs play with a ball in the snow, naïve ones"],
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_that_are_not_english_get_one_warning(language):
    captions = [clean_caption(caption) for caption in LANGUAGES[language]]
    found = check_captions(table(range(len(captions)), captions=captions), 100)
    assert len(found.warnings) == (language != "English")
    for warning in found.warnings:
        assert "translate what is not English (docs/data.md, Other languages)" in warning


def test_different_captions_with_equal_tokens_are_counted():
    reading = read(["a café", "a cafe", "a cafe", "a dog"], "captions", blip_tokenizer())
    assert reading.alike == pytest.approx(1 / 3)  # of three different ones
    reading = read(["a dog", "playing badminton"], "captions", blip_tokenizer())
    ids = blip_tokenizer().bert(["a dog", "playing badminton"])["input_ids"]
    assert reading.pieces == (sum(map(len, ids)) - 4) / 4 and reading.foreign == 0 == reading.alike
    assert read(["été"], "captions", blip_tokenizer()).foreign == pytest.approx(2 / 3)


# ---------------------------------------------------------------- recipe, disk, negatives


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("retrieval_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_follow_the_rules(path, monkeypatch):
    monkeypatch.setattr("training.recipe.cores", lambda: 4)
    pairs = {"coco": 566747, "flickr": 145000, "custom": 10000, "scenes": 18000, "emoji": 15470}
    cfg = load_config(path)
    assert check_recipe(cfg, table(range(pairs[cfg.dataset]))).warnings == []


@pytest.mark.parametrize(("changes", "said"), [
    ({}, ["init_lr 1e-05 .*set init_lr to 3.5e-06, or global_batch_size to 256", "momentum 0.995 .*to 0.99937"]),
    ({"init_lr": "3.5e-6", "momentum": "0.99937"}, []),
    ({"vit": "large", "global_batch_size": "256", "init_lr": "1.2e-5"}, ["5e-06 at 256 is .*set init_lr to 5e-06"]),
    ({"init_lr": "3.5e-6", "momentum": "0.99937", "max_epoch": "1", "queue_size": "32"}, ["^31 optimizer steps"]),
    ({"pretrained": ""}, []),  # nothing is published for random weights
])  # fmt: skip
def test_batch_and_rate_are_held_against_the_published_rule(changes, said):
    cfg = load_config(ROOT / "tests" / "assets" / "blip_retrieval_coco.yaml", changes)
    pairs = 1000 if "max_epoch" in changes else 566747
    found = [line for line in check_recipe(cfg, table(range(pairs))).warnings if "num_workers" not in line]
    assert len(found) == len(said)
    for line, pattern in zip(found, said, strict=True):
        assert re.search(pattern, line), line


def test_room_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("training.recipe.shutil.disk_usage", lambda path: SimpleNamespace(free=15_000_000_000))
    found = check_disk(tmp_path / "a" / "b", 3_570_000_000, keep_last=2)
    assert not found.errors and "4 checkpoints of 3.57 GB at most, 15 GB free" in found.facts[0]
    assert "too full" in check_disk(tmp_path / "a", 4_000_000_000, 2).errors[0]


LESS = {
    "all": {},
    "freeze": {"freeze": ["image", "text:1"]},
    "lora": {"lora": {"rank": 2, "alpha": 4, "targets": ["image.qkv"]}},
}


@pytest.mark.parametrize("name", LESS)
def test_the_size_of_a_save_is_that_of_the_file(tiny_run, name):
    """Frozen weights are in it too, with their twins where these are not shared; known before there is memory."""
    cfg = load_config(tiny_run / "config.yaml", LESS[name])
    with torch.device("meta"):
        model = build_model(cfg)
        train_less(model, cfg)
        expected = size_of_save(model)
    model = build_model(cfg)
    train_less(model, cfg)
    optimizer = build_optimizer(model, cfg)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    path = save_run(tiny_run / "out", model, optimizer, asdict(cfg), RunState(), keep_last=1)
    names = 700_000  # the vocabulary and what a file says of its tensors
    assert expected < path.stat().st_size < expected + names


@pytest.mark.parametrize(("ids", "everywhere", "fails"), [
    ([0] * 8, True, True), ([0] * 7 + [1], True, False), ([0] * 4 + [1] * 4, True, False), (range(8), False, False),
    ([0] * 7 + [1], False, True),
])  # fmt: skip
def test_a_pool_of_one_image_is_found_before_the_first_step(ids, everywhere, fails):
    sizes = {"global_batch_size": 8, "ranks_emulated": 2, "max_epoch": 2}
    cfg = RetrievalConfig(dataset="coco", negative_all_rank=everywhere, **sizes)
    if fails:
        with pytest.raises(ValueError, match="epoch 0, step 0 all [48] samples .* show the same image"):
            require_negatives(cfg, table(ids), seed=0)
    else:
        require_negatives(cfg, table(ids), seed=0)


# ---------------------------------------------------------------- while training


def test_matching_at_its_prior_is_said_once(caplog):
    warnings = TrainingWarnings(steps_per_epoch=100)
    for step in range(400):
        warnings.step(f"step {step}", 0.6365 + 0.05 * (-1) ** step, 0.07)
    (record,) = [r for r in caplog.records if "loss_itm" in r.message]
    assert record.message.startswith("warning: step 99") and "pretrained" in record.message
    caplog.clear()
    warnings = TrainingWarnings(100)
    for _ in range(400):
        warnings.step("", 0.60, 0.07)
    assert not caplog.records


@pytest.mark.parametrize(("temp", "limit"), [(0.001, "0.001"), (0.0009, "0.001"), (0.5, "0.5"), (0.51, "0.5")])
def test_a_temperature_at_its_limit_is_said_once(caplog, temp, limit):
    warnings = TrainingWarnings(100)
    for value in (0.07, temp, temp):
        warnings.step("epoch 0, step 1", 0.5, float(torch.tensor(value)))
    (record,) = caplog.records
    assert f"limit {limit} " in record.message and "temp_lr_scale" in record.message


def test_recall_within_noise_of_chance():
    chance = {f"chance_{way}_r{k}": 100 * k / 300 for way in ("txt", "img") for k in (1, 10)}
    reported = {"txt_r1": 0.33, "txt_r10": 2.67, "img_r1": 0.33, "img_r10": 3.67}  # what users took for a result
    assert within_noise({**chance, **reported}, 300, 300)
    assert not within_noise({**chance, **reported, "img_r10": 6.0}, 300, 300)
    assert not within_noise({**chance, **reported, "txt_r1": 2.0}, 300, 300)
    full = {**chance, **reported, "chance_txt_r10": 100.0, "txt_r10": 100.0}
    assert within_noise(full, 300, 300)  # a gallery of ten says nothing in R@10


def test_chance_level_is_said_after_an_epoch(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("retrieval.evaluate.within_noise", lambda *args: True)
    assert run(tiny_run) == 0
    assert capsys.readouterr().err.count("within noise of chance") == 1  # not once an epoch


def test_a_long_list_of_images_goes_to_a_file(tiny_run, capsys, monkeypatch):
    original = loop.compute_gradients

    def broken(*args):
        report = original(*args)
        report.by_rank["loss_ita"].fill_(float("inf"))
        return report

    monkeypatch.setattr(loop, "compute_gradients", broken)
    assert run(tiny_run, "--set", "global_batch_size=12") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    path = tiny_run / "out" / "nonfinite_batch.txt"
    assert error.startswith("error: epoch 0, step 0") and f"and 2 more, all in {path}" in error
    assert "the start of the run" in error and len(path.read_text().splitlines()) == 12


def test_scores_that_are_not_finite_stop_the_run(tiny_run, capsys, monkeypatch):
    original = evaluate.rerank

    def broken(*args):
        ranking = original(*args)
        if list(tiny_run.glob("out/log.txt")):  # after the first epoch
            ranking.itm.i2t_value[0, 0] = float("nan")
        return ranking

    monkeypatch.setattr(evaluate, "rerank", broken)
    assert run(tiny_run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: custom val: 1 of") and "not finite" in error and "last good state" in error
    assert [line["epoch"] for line in lines(tiny_run / "out" / "log.txt")] == [-1]


# ---------------------------------------------------------------- odd and broken images


def odd_images(folder) -> None:
    """Training images of every odd kind that can be decoded, and two that cannot."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    kinds = [
        lambda path: picture.convert("CMYK").save(path, "JPEG"),
        lambda path: Image.fromarray(rng.integers(0, 65536, (20, 20)).astype(np.uint16)).save(path, "PNG"),
        lambda path: picture.quantize(8).save(path, "PNG", transparency=bytes([0, 128])),
        lambda path: picture.save(path, "JPEG", exif=exif),
        lambda path: frames[0].save(path, "GIF", save_all=True, append_images=frames[1:]),
        lambda path: Image.new("1", (1, 1)).save(path, "PNG"),
        lambda path: Image.new("L", (1, 500)).save(path, "PNG"),
        lambda path: picture.convert("LA").save(path, "PNG"),
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: Image.new("1", (10000, 10000)).save(path, "PNG"),  # 100 megapixels
    ]
    for i, make in enumerate(kinds):
        make(folder / "images" / f"train_{i}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images_train_and_broken_ones_are_skipped_and_counted(tiny_run, capsys, workers):
    odd_images(tiny_run)
    assert run(tiny_run) == 2
    assert "2 of 12 images are unreadable: image train_8.png" in capsys.readouterr().err
    assert run(tiny_run, "--set", "on_bad_sample=skip", f"num_workers={workers}", "max_epoch=1") == 0
    messages = capsys.readouterr().err
    *_, epoch, _ = lines(tiny_run / "out" / "log.txt")
    assert epoch["train_skipped"] == 4  # two images with two captions each
    assert "epoch 0: 4 times another image took the place of an unreadable one" in messages
    assert "on_bad_sample skip leaves them out of training" in messages


def test_training_stops_at_a_broken_image_that_the_sample_missed(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(image_checks, "QUICK_IMAGES", 1)
    (tiny_run / "images" / "train_3.png").write_bytes(b"")
    assert run(tiny_run) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: image train_3.png")


def test_messages_below_warning_stay_silent_elsewhere(caplog):
    found = findings.Findings(["a fact"], ["a warning"], [])
    with caplog.at_level(logging.INFO):
        found.raise_or_log()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    with pytest.raises(ValueError, match="first .2 more: --check lists all."):
        findings.Findings(errors=["first", "b", "c"]).raise_or_log()
