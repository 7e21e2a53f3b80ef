"""What an exported folder says about itself, and the files of a release."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

import train_retrieval
from checkpoints.__main__ import main
from tests.conftest import tiny_model

ROOT = Path(__file__).parent.parent


def test_the_card_of_a_run_has_its_recall_and_what_it_was_trained_on(tiny_run):
    args = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "out"), "--device", "cpu"]
    assert train_retrieval.main([*args, "--set", "max_epoch=1", "init_lr=0.0123"]) == 0
    best = str(tiny_run / "out" / "checkpoint_best.pth")
    assert main(["export", best, str(tiny_run / "hf")]) == 0
    card = (tiny_run / "hf" / "README.md").read_text()
    assert ModelCard(card).data.license == "other"
    assert re.search(r"^\| by chance \| \| 25 89.3 100 \| 25 100 100 \|$", card, re.MULTILINE), card
    test = [json.loads(line) for line in (tiny_run / "out" / "log.txt").read_text().splitlines()][-1]
    (row,) = re.findall(r"\| custom test \| 4, 8 \| (.*) \| (.*) \|", card)
    assert row[0].split() == [f"{test[f'test_txt_r{k}']:.1f}" for k in (1, 5, 10)]
    assert row[1].split() == [f"{test[f'test_img_r{k}']:.1f}" for k in (1, 5, 10)]
    assert "Data set `custom` (train.json), from random weights; weights of epoch 0" in card
    assert "init_lr 0.0123" in card and "seed 42" in card and test["checkpoint_sha256"][:16] in card
    for section in ("trained on", "Recall", "Limits", "Licence"):
        assert re.search(rf"^## .*{section}", card, re.MULTILINE)

    other = torch.load(best, weights_only=True)
    other["model"]["temp"] += 0.01
    torch.save(other, tiny_run / "out" / "other.pth")
    assert main(["export", str(tiny_run / "out" / "other.pth"), str(tiny_run / "hf2")]) == 0
    assert "Not measured, or not with these very weights" in (tiny_run / "hf2" / "README.md").read_text()


def test_a_file_that_says_nothing(tmp_path, capsys):
    model = tiny_model()
    med = vars(model.text_encoder.config)
    torch.save({"model": model.state_dict(), "text_config": dict(med)}, tmp_path / "bare.pth")
    assert main(["export", str(tmp_path / "bare.pth"), str(tmp_path / "hf")]) == 0, capsys.readouterr().err
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Unknown: the file does not say" in card and "It reads English." in card


def test_a_log_that_is_none_or_was_cut_short_says_nothing(tiny_run):
    args = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "out"), "--device", "cpu"]
    assert train_retrieval.main([*args, "--set", "max_epoch=1"]) == 0
    log, best = tiny_run / "out" / "log.txt", str(tiny_run / "out" / "checkpoint_best.pth")
    log.write_bytes(b"epoch 1: loss 3\n[1]\n" + log.read_bytes() + b'{"epoch": 1, "val_')
    assert main(["export", best, str(tiny_run / "hf")]) == 0
    assert "| custom test | 4, 8 |" in (tiny_run / "hf" / "README.md").read_text()


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = YAML().load(ROOT / "CITATION.cff")
    newest = re.search(r"^## (\d+\.\d+\.\d+), (\d{4}-\d\d-\d\d)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert version == citation["version"] == newest[1] and str(citation["date-released"]) == newest[2]


@pytest.mark.parametrize("key", ["cff-version", "message", "title", "authors", "license"])
def test_the_citation_has_what_the_format_requires(key):
    citation = YAML().load(ROOT / "CITATION.cff")
    assert citation[key]
    assert citation["preferred-citation"]["title"].startswith("BLIP")
