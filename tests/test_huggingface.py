"""Hugging Face folders: transformers' own class computes the same on an exported one, and round trips are exact."""

import argparse
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BlipForImageTextRetrieval, BlipProcessor

from checkpoints.__main__ import export_folder, import_folder, main
from checkpoints.files import DamagedFile
from checkpoints.load import load_pretrained
from configs.sizes import MedConfig
from models import load
from models.blip_retrieval import BLIP_Retrieval, as_match_input
from tests.conftest import tiny_med, tiny_model
from transform.image import STD, eval_transform
from transform.rgb import PixelRule
from transform.text import ENC, blip_tokenizer, tokenize

SMALL = {"vocab_size": 50, "max_position_embeddings": 40}


def save(path: Path, model: BLIP_Retrieval, **extra) -> str:
    torch.save({"model": model.state_dict(), "config": {}, "epoch": 0, **extra}, path)
    return str(path)


def with_config(model: BLIP_Retrieval) -> dict:
    return {"text_config": asdict(model.text_encoder.config)}


@torch.no_grad()
def assert_transformers_computes_the_same(model: BLIP_Retrieval, folder: Path) -> None:
    """Features, similarities and matching logits of two images and two texts of unequal length."""
    theirs, info = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.eval(), theirs.eval()
    size = model.visual_encoder.patch_embed.img_size[0]
    image, text = torch.randn(2, 3, size, size), tokenize(["a red ball", "two small dogs under a large street table"])
    tokens = model.encode_image(image)
    out = theirs(text.input_ids, image, use_itm_head=False, attention_mask=text.attention_mask)
    image_feat = F.normalize(theirs.vision_proj(out.last_hidden_state[:, 0]), dim=-1)
    text_feat = F.normalize(theirs.text_proj(out.question_embeds[:, 0]), dim=-1)
    match = theirs(as_match_input(text).input_ids, image, attention_mask=text.attention_mask).itm_score
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.last_hidden_state, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image_feat, model.image_feature(tokens), **close)
    torch.testing.assert_close(text_feat, model.text_feature(model.encode_text(text)), **close)
    torch.testing.assert_close(match, model.match(text, tokens), **close)
    assert (match[0] - match[1]).abs().max() > 1e-3  # the comparison is of something


@pytest.mark.parametrize(("vit", "size"), [("nano", 32), ("tiny", 64)])
def test_transformers_computes_the_same_on_an_exported_folder(tmp_path, vit, size):
    model = tiny_model(vit=vit, image_size=size)
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    assert_transformers_computes_the_same(model, tmp_path / "hf")


def test_transformers_computes_the_same_for_vit_base(tmp_path):
    """The published sizes, read from the shapes alone as for a published file."""
    with torch.device("meta"):
        model = BLIP_Retrieval(MedConfig(), image_size=64, queue_size=8)
    state = {
        key: 1 + 0.1 * torch.randn(value.shape) if "norm" in key.lower() else 0.05 * torch.randn(value.shape)
        for key, value in model.state_dict().items()
        if "_m." not in key and "_queue" not in key
    } | {"temp": torch.tensor(0.07)}
    model.load_state_dict(state, strict=False, assign=True)  # twins and queues stay without memory
    torch.save(state, tmp_path / "a.pth")
    export_folder(str(tmp_path / "a.pth"), tmp_path / "hf")
    assert_transformers_computes_the_same(model, tmp_path / "hf")


def test_round_trip_is_bit_exact(tmp_path):
    model = tiny_model(med_config=tiny_med(hidden_dropout_prob=0.1, layer_norm_eps=1e-11, **SMALL))
    with torch.no_grad():
        model.temp.fill_(0.0123456789)
    first = save(tmp_path / "a.pth", model, **with_config(model))
    export_folder(first, tmp_path / "hf")
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
    report = import_folder(tmp_path / "hf", tmp_path / "b.pth")
    export_folder(str(tmp_path / "b.pth"), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    data = torch.load(tmp_path / "b.pth", weights_only=True)
    assert data["text_config"] == asdict(model.text_encoder.config)
    for key, value in model.state_dict().items():
        if not key.endswith("_queue"):
            assert torch.equal(data["model"][key], value), key  # twins equal the online weights in a new model
    assert len(report.seeded) == sum("_m." in key for key in data["model"])
    assert (tmp_path / "b.pth").stat().st_size < 1.1 * (tmp_path / "hf" / "model.safetensors").stat().st_size

    loaded = tiny_model(med_config=tiny_med(**SMALL))
    assert load_pretrained(loaded, str(tmp_path / "b.pth")).seeded == []
    assert torch.equal(loaded.temp, model.temp)


def test_folder_is_loaded_like_a_file(tmp_path):
    model, other = tiny_model(med_config=tiny_med(**SMALL)), tiny_model(med_config=tiny_med(**SMALL), image_size=64)
    with torch.no_grad():
        model.temp.fill_(0.05)
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    report = load_pretrained(other, str(tmp_path / "hf"))
    assert report.resampled == ["visual_encoder.pos_embed"] and "Hugging Face" in report.kind
    assert torch.equal(other.temp, model.temp) and torch.equal(other.itm_head.weight, model.itm_head.weight)
    for online, twin in other.twins():
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), twin.parameters(), strict=True))


def test_temp_survives_transformers_saving_the_folder_again(tmp_path):
    model = tiny_model(med_config=tiny_med(**SMALL))
    with torch.no_grad():
        model.temp.fill_(0.0123456789)
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf", local_files_only=True)
    theirs.save_pretrained(tmp_path / "again")
    loaded = tiny_model(med_config=tiny_med(**SMALL))
    load_pretrained(loaded, str(tmp_path / "again"))
    for key, value in model.state_dict().items():
        assert key.endswith("_queue") or torch.equal(loaded.state_dict()[key], value), key


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder as others have: no temperature, transformers' norm epsilon, an old buffer."""
    model = tiny_model(med_config=tiny_med(**SMALL))
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    change(tmp_path / "hf", lambda config: (config.pop("temp"), config["vision_config"].pop("layer_norm_eps")))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    return tmp_path / "hf"


def change(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_foreign_folder_gets_the_initial_temperature_and_says_so(foreign, caplog):
    model = tiny_model(med_config=tiny_med(**SMALL))
    with torch.no_grad():
        model.temp.fill_(0.3)
    with caplog.at_level(logging.INFO):
        report = load_pretrained(model, str(foreign))
    assert model.temp.item() == pytest.approx(0.07) and "text_encoder.embeddings.position_ids" in report.ignored
    assert "no temperature" in caplog.text and "layer_norm_eps 1e-05" in caplog.text


def test_heads_that_the_folder_names_are_compared(foreign):
    change(foreign, lambda config: config["text_config"].update(num_attention_heads=2))
    with pytest.raises(ValueError, match="has 2 attention heads, the config's 4"):
        load_pretrained(tiny_model(med_config=tiny_med(**SMALL)), str(foreign))
    change(foreign, lambda config: config["vision_config"].update(num_attention_heads=4))
    with pytest.raises(ValueError, match="ViT-nano .* with 4 heads, but BLIP's has 3"):
        import_folder(foreign, foreign / "b.pth")


@pytest.mark.parametrize(("edit", "words"), [
    (lambda folder: [path.unlink() for path in folder.iterdir()], "neither a Hugging Face folder"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "describes no BLIP model"),
    (lambda folder: change(folder, lambda c: c.update(architectures=["BlipForConditionalGeneration"])),
     "describes BlipForConditionalGeneration; only BlipForImageTextRetrieval"),
    (lambda folder: change(folder, lambda c: c.update(model_type="bert")), "only BlipForImageTextRetrieval"),
    (lambda folder: change(folder, lambda c: c["text_config"].update(hidden_act="relu")), "hidden_act is 'relu'"),
    (lambda folder: change(folder, lambda c: c["text_config"].update(hidden_size="wide")), "transformers refuses it"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
     "has neither model.safetensors nor pytorch_model.bin but model.safetensors.index.json: save it again"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{"), "cut short"),
    (lambda folder: save_file({"fusion.weight": torch.ones(1)}, folder / "model.safetensors"), "1 tensors are not"),
    (lambda folder: save_file({"itm_head.bias": torch.ones(2)}, folder / "model.safetensors"), "it has no tensor"),
])  # fmt: skip
def test_folders_that_do_not_fit_are_explained(foreign, edit, words):
    edit(foreign)
    with pytest.raises(ValueError, match=words):
        load_pretrained(tiny_model(med_config=tiny_med(**SMALL)), str(foreign))


def test_cut_tensors_are_damaged(foreign):
    content = (foreign / "model.safetensors").read_bytes()
    (foreign / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(DamagedFile, match="model.safetensors: not a safetensors file, or cut short"):
        load_pretrained(tiny_model(med_config=tiny_med(**SMALL)), str(foreign))


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    monkeypatch.setattr("checkpoints.__main__.setup_logging", lambda: None)


def test_commands_there_and_back(tmp_path, capsys):
    model = tiny_model(med_config=tiny_med(num_attention_heads=1, **SMALL))
    source, folder, back = save(tmp_path / "a.pth", model), str(tmp_path / "hf"), str(tmp_path / "sub" / "b.pth")
    assert main(["export", source, folder]) == main(["import", folder, back]) == main(["inspect", folder]) == 0
    assert main(["inspect", back]) == 0
    printed = capsys.readouterr().out
    assert "hf: weights of a retrieval model" not in printed and "hf: Hugging Face BlipForImage" in printed
    assert printed.count("ViT-nano (96 wide, 6 deep)") == 2 and "heads 1" in printed  # 64 wide: one head, by the rule


def test_export_with_a_config_takes_its_heads_and_image_size(tmp_path, capsys):
    model = tiny_model(med_config=tiny_med(hidden_size=48, **SMALL))
    source = save(tmp_path / "a.pth", model)
    assert main(["export", source, str(tmp_path / "hf")]) == 2
    assert "does not say how many attention heads" in capsys.readouterr().err
    med = {k: v for k, v in asdict(model.text_encoder.config).items() if k != "encoder_width"}
    (tmp_path / "med.json").write_text(json.dumps(med))
    yaml = f"dataset: scenes\nimage_root: x\nimage_size: 64\nembed_dim: 32\nmed_config: {tmp_path}/med.json\nvit: {{}}"
    (tmp_path / "c.yaml").write_text(yaml.format("nano"))
    assert main(["export", source, str(tmp_path / "hf"), "--config", str(tmp_path / "c.yaml")]) == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["text_config"]["num_attention_heads"] == 4 and written["vision_config"]["image_size"] == 64
    assert "2 resampled" in capsys.readouterr().out  # twins too, though they are not exported
    (tmp_path / "c.yaml").write_text(yaml.format("tiny"))
    assert main(["export", source, str(tmp_path / "other"), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "set `vit: nano`" in capsys.readouterr().err


def test_nothing_is_written_over(tmp_path, capsys):
    """A filled-in card, a run, another export, a checkpoint: each stays as it is, and the reason is said."""
    model = tiny_model(med_config=tiny_med(**SMALL))
    source = save(tmp_path / "a.pth", model, **with_config(model))
    export_folder(source, tmp_path / "hf")
    for path in (tmp_path / "hf", tmp_path, tmp_path / "a.pth"):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert main(["export", source, str(path)]) == 2
        assert f"{path}: there is something already" in capsys.readouterr().err
        assert main(["import", str(tmp_path / "hf"), str(path)]) == 2
        assert f"{path}: there is something already" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_how_captions_and_pixels_are_read_goes_along(tmp_path):
    model = tiny_model(tokenizer=replace(blip_tokenizer(), max_words=60, max_tokens=80))
    trained = {"flatten_alpha": "white", "grey_bits": 12, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    extra = {"config": trained, "tokenizer": model.tokenizer.to_plain()}
    export_folder(save(tmp_path / "a.pth", model, **with_config(model), **extra), tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "b.pth")
    for source in (tmp_path / "a.pth", tmp_path / "hf", tmp_path / "b.pth"):
        blip = load(source)
        assert blip.rule == PixelRule(12, "white"), source
        assert (blip.model.tokenizer.max_words, blip.model.tokenizer.max_tokens) == (60, 80)
        assert blip.transform.transforms[-1].mean == [0.5] * 3


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, there):
    """An empty folder that is there, as a mount may be, is filled and not replaced."""
    model = tiny_model(med_config=tiny_med(**SMALL))
    source = save(tmp_path / "a.pth", model, **with_config(model))
    if there:
        (tmp_path / "hf").mkdir(mode=0o750)
        state = (tmp_path / "hf").stat()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("checkpoints.huggingface.save_file", full)
        assert main(["export", source, str(tmp_path / "hf")]) == 2
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == (["a.pth", "hf"] if there else ["a.pth"])
    assert main(["export", source, str(tmp_path / "hf")]) == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= names and not any(n.startswith(".") for n in names)
    if there:
        now = (tmp_path / "hf").stat()
        assert (now.st_ino, now.st_mode) == (state.st_ino, state.st_mode)


def test_transformers_processor_prepares_the_same_inputs(tmp_path):
    model = tiny_model(med_config=tiny_med(), image_size=64)
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    processor = BlipProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    image = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
    captions = ["a red ball", "two small dogs under a large street table"]
    theirs = processor(images=[image] * 2, text=captions, padding=True, max_length=None, return_tensors="pt")
    ours = tokenize(captions)
    assert torch.equal(theirs["input_ids"], ours.input_ids)
    assert torch.equal(theirs["attention_mask"], ours.attention_mask)
    one_level = 1 / 255 / min(STD) + 1e-5
    torch.testing.assert_close(theirs["pixel_values"][0], eval_transform(64)(image), rtol=0, atol=one_level)
    assert processor.tokenizer.convert_tokens_to_ids("[ENC]") == ENC


@pytest.mark.parametrize("kind", ["bin in a folder", "bin alone", "safetensors alone", "safetensors without config"])
def test_files_of_a_folder_load_by_themselves(tmp_path, kind, caplog):
    model = tiny_model(med_config=tiny_med(num_attention_heads=1, **SMALL))
    export_folder(save(tmp_path / "a.pth", model, **with_config(model)), tmp_path / "hf")
    tensors = tmp_path / "hf" / "model.safetensors"
    if kind.startswith("bin"):
        torch.save(load_file(tensors), tmp_path / "hf" / "pytorch_model.bin")
        tensors.unlink()
        tensors = tmp_path / "hf" / "pytorch_model.bin"
    if kind.endswith("without config"):
        (tmp_path / "hf" / "config.json").unlink()
    source = tensors.parent if kind.endswith("folder") else tensors
    other = tiny_model(med_config=tiny_med(num_attention_heads=1, **SMALL))
    load_pretrained(other, str(source))
    assert torch.equal(other.vision_proj.weight, model.vision_proj.weight)
    assert ("gives no temperature" in caplog.text) == kind.endswith("without config")
    assert kind.endswith("without config") or torch.equal(other.temp, model.temp)
    if kind.endswith("without config"):
        load_pretrained(other, str(tmp_path / "hf"))  # a folder with nothing but the tensors


def test_a_refused_pickle_in_a_folder_names_the_remedy(tmp_path):
    (tmp_path / "hf").mkdir()
    torch.save({"model": torch.ones(1), "args": argparse.Namespace()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: holds argparse.Namespace besides tensors"):
        load_pretrained(tiny_model(), str(tmp_path / "hf"))
