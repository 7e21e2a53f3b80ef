"""Tiny models and drawn data for every test; nothing here touches the network."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is a CPU suite; benchmarks cover the GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from checkpoints import download
from configs.sizes import MedConfig
from models.blip_retrieval import BLIP_Retrieval
from tests.local_server import serving

WORDS = "a red blue green dog cat man woman on under near with table street ball the small large two running".split()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; downloads try again without a pause."""
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    with serving() as server:
        yield server


@pytest.fixture
def phone():
    """A page in a browser, as narrow as a phone."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not browser:
        pytest.skip("needs chromium (apt-get install chromium)")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as play:
        window = play.chromium.launch(executable_path=browser, args=switches)
        yield window.new_page(viewport={"width": 360, "height": 700})
        window.close()


def tiny_med(**overrides) -> MedConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return MedConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **overrides})


def tiny_model(dtype: torch.dtype = torch.float32, **overrides) -> BLIP_Retrieval:
    """A model of about 5 million parameters, most of them word embeddings, with weights far from their small init."""
    kwargs = {"med_config": tiny_med(), "image_size": 32, "vit": "nano", "embed_dim": 32, "queue_size": 64}
    model = BLIP_Retrieval(**{**kwargs, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(dtype)


def random_captions(count: int, generator: torch.Generator | None = None, longest: int = 12) -> list[str]:
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


@pytest.fixture
def tiny_run(tmp_path):
    return make_tiny_run(tmp_path)


def make_tiny_run(tmp_path: Path) -> Path:
    """A folder with 12 training, 4 validation and 4 test pictures, annotations and a config that trains in seconds."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        rows = []
        for i in range(count):
            colour, name = rng.integers(0, 256, 3), f"{split}_{i}.png"
            pixels = np.clip(colour + rng.integers(-20, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name)
            words = [WORDS[j] for j in rng.integers(0, len(WORDS), 5)]
            rows.append({"image": name, "caption": [" ".join(words), " ".join(words[::-1])], "image_id": f"{split}{i}"})
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "med.json").write_text(json.dumps({**text, "hidden_dropout_prob": 0.1}))
    config = {
        "dataset": "custom", "image_root": str(tmp_path / "images"), "ann_root": str(tmp_path),
        "train_file": "train.json", "val_file": "val.json", "test_file": "test.json", "num_workers": 0,
        "vit": "nano", "image_size": 32, "embed_dim": 16, "med_config": str(tmp_path / "med.json"),
        "queue_size": 24, "k_test": 64, "batch_size_train": 4, "batch_size_test": 3, "max_epoch": 2,
        "global_batch_size": 8, "ranks_emulated": 2, "init_lr": 1e-4,
    }  # fmt: skip
    YAML().dump(config, tmp_path / "config.yaml")
    return tmp_path
