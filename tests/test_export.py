"""Exported graphs: equal to the model at any size, consumed without torch, whole or not on the disk at all."""

import copy
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import graphs
from checkpoints.__main__ import main
from checkpoints.graphs import VERIFIED, compare, write_graphs
from configs.schema import RetrievalConfig
from configs.sizes import VIT_SIZES, VitSize
from data import scenes
from data.annotations import load_annotations
from models import exported, load
from models.exported import Encoder, ImagePart, MatchPart, TextPart
from retrieval.evaluate import evaluate
from retrieval.threshold import FILE
from tests.conftest import tiny_med, tiny_model
from transform.text import ENC, TokenizedText, blip_tokenizer, clean_caption, tokenize

pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
pytest.importorskip("onnxscript", reason="pip install -r requirements-export.txt")

ROOT = Path(__file__).parent.parent
# What a consumer's environment lacks.
WITHOUT_TORCH = "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'transformers', 'timm')))\n"
CAPTIONS = ["A red ball!", "", "...", "two  small\tdogs\n", 'a "unaffable" ' * 30, "ÉCLAIR Straße (İ)", "[ENC] <b>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny checkpoint with rules of its own, `onnx/` and `pt2/` of it, and the drawn data set with its real test."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT_SIZES, "atom", VitSize(48, 2, 3, 0.0))
        patch.setattr("checkpoints.__main__.setup_logging", lambda: None)
        patch.setattr(scenes, "TRAIN_IMAGES", 24)
        patch.setattr(scenes, "VAL_IMAGES", 4)
        torch.manual_seed(0)
        med = tiny_med(hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=40)
        model = tiny_model(vit="atom", image_size=60, patch_size=20, med_config=med)
        (folder / "run").mkdir()
        path, rules = folder / "run" / "checkpoint_best.pth", {"grey_bits": 12, "flatten_alpha": "white"}
        torch.save(
            {"model": model.state_dict(), "config": rules, "text_config": asdict(model.text_encoder.config)}, path
        )
        sha256 = exported.weights_sha256(load(path).model)
        (folder / "run" / FILE).write_text(json.dumps({"threshold": 0.75, "weights_sha256": sha256}))
        assert main(["onnx", str(folder / "run"), str(folder / "onnx")]) == 0
        assert main(["export2", str(path), str(folder / "pt2")]) == 0
        scenes.ensure_scenes(folder / "scenes")
        yield folder


@pytest.fixture(params=["onnx", "pt2"], scope="module")
def used(request, folder):
    """The consumer of each format."""
    sys.path.insert(0, str(folder / request.param))
    yield importlib.import_module("use").Exported()
    sys.path.pop(0)
    for name in ("use", "rgb"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """One of each mode that needs a rule."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    rgb = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (33, 20, 4), np.uint8))
    grey = Image.fromarray(rng.integers(0, 4096, (40, 90), np.uint16))
    for name, image in {
        "rgb": rgb,
        "alpha": alpha,
        "grey16": grey,
        "grey": rgb.convert("L"),
        "p": rgb.quantize(),
    }.items():
        image.save(folder / f"{name}.png")
    return sorted(folder.iterdir())


# ---- the consumer ---------------------------------------------------------------------------------------------------


def test_recall_on_scenes_without_torch_is_the_models(folder):
    cfg = RetrievalConfig(dataset="scenes", image_root=str(folder / "scenes"), ann_root=str(folder / "scenes"),
                          image_size=60, patch_size=20, k_test=4, batch_size_test=100, num_workers=0,
                          eval_precision="fp32")  # fmt: skip
    table = load_annotations(cfg, "test")
    assert (len(table.images), len(table.captions)) == (500, 1500)
    wanted, kept = evaluate(load(folder / "run").model, cfg, table, "test")
    script = str(ROOT / "benchmarks" / "recall_without_torch.py")
    args = [script, str(folder / "onnx"), str(folder / "scenes"), "--k", "4", "--keep", str(folder / "kept.npz")]
    code = f"{WITHOUT_TORCH}import runpy; sys.argv = {args}; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for key in found.keys() - {"seconds", "torch"}:
        assert found[key] == pytest.approx(wanted[f"test_{key}"], abs=1e-3), key
    with np.load(folder / "kept.npz") as file:  # chance Recall could agree by chance, shortlists and scores do not
        for way, direction in (("i2t", kept.txt), ("t2i", kept.img)):
            assert (file[way] == direction.itc.best[:, :4]).mean() > 0.999
            score = np.sort(file[f"{way}_itm"], 1)[:, ::-1]
            same = (np.sort(file[way], 1) == np.sort(direction.itm.best[:, :4], 1)).all(1)
            np.testing.assert_allclose(score[same], direction.itm.score[same, :4], atol=1e-4)
            assert score.std() > 0.01


def test_the_command_ranks_pictures_without_torch(folder, pictures):
    args = [str(folder / "onnx" / "use.py"), "A red ball.", *map(str, pictures)]
    code = f"{WITHOUT_TORCH}import runpy; sys.argv = {args}; sys.path.insert(0, {str(folder / 'onnx')!r})\n"
    code += f"runpy.run_path({args[0]!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    blip = load(folder / "run")
    score, match = (f(pictures, "A red ball.")[:, 0] for f in (blip.score, blip.match))
    lines = [f"{score[i]:8.3f}  P(match) {match[i]:.3f}  {pictures[i]}" for i in score.argsort(descending=True)]
    assert done.stdout.splitlines() == lines


def test_inputs_are_prepared_as_here_to_the_bit(used, folder, pictures):
    blip = load(folder / "run")
    assert blip.rule == (12, "white")
    for picture in pictures:
        np.testing.assert_array_equal(used.pixels(picture), blip.pixels(picture)[0].numpy(), err_msg=picture.name)
    ids, mask = used.ids(CAPTIONS)
    wanted = tokenize([clean_caption(text) for text in CAPTIONS])
    assert ids.shape == (7, 35) and ids.dtype == mask.dtype == np.int64
    np.testing.assert_array_equal(ids, wanted.input_ids.numpy())
    np.testing.assert_array_equal(mask, wanted.attention_mask.numpy())


@pytest.mark.parametrize("count", [1, 3, 5])
def test_graphs_compute_what_the_model_does(used, folder, pictures, count):
    blip, captions = load(folder / "run"), CAPTIONS[:count]
    tokens, feature = used.images(pictures[:count])
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(tokens, blip.encode(pictures[:count])[0].numpy(), **close)
    np.testing.assert_allclose(feature, blip.image_features(pictures[:count]).numpy(), **close)
    np.testing.assert_allclose(used.texts(captions), blip.text_features(captions).numpy(), **close)
    logits = used.match(captions, tokens)
    np.testing.assert_allclose(
        logits[:, 1] + (feature * used.texts(captions)).sum(1),
        blip.score(pictures[:count], captions, pairwise=True).numpy(), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert count == 1 or np.ptp(logits[:, 1]) > 1e-2  # the comparison is of something


def test_enc_is_put_in_inside(used):
    ids, mask = used.ids(["a red ball", "two small dogs"])
    tokens = np.random.default_rng(0).normal(size=(2, 10, 48)).astype(np.float32)
    with_cls = used.match_graph(ids, mask, tokens)[0]
    ids[:, 0] = ENC
    np.testing.assert_array_equal(used.match_graph(ids, mask, tokens)[0], with_cls)


def test_what_lies_beside_the_graphs(folder):
    for kind in ("onnx", "pt2"):
        rules = json.loads((folder / kind / "preprocess.json").read_text())
        assert rules["image"]["size"] == 60 and rules["image"]["rgb"] == {"grey_bits": 12, "flatten_alpha": "white"}
        assert rules["threshold"] == 0.75 and rules["source"]["precision"] == "fp32"
        assert rules["source"]["checkpoint"] in ("run", "checkpoint_best.pth")  # no path of this machine
        assert set(rules["largest_difference"]) == {"image.tokens", "image.feature", "text.feature", "match.logits"}
        words = (folder / kind / "vocab.txt").read_text().splitlines()
        assert len(words) == 30524 and words[2000] == "to" and words[-2:] == ["[DEC]", "[ENC]"]
    size = {path.name: path.stat().st_size for path in (folder / "onnx").iterdir()}
    vocabulary = 30524 * 32 * 4
    assert size["image.onnx"] < vocabulary < size["text.onnx"] < size["match.onnx"] < 1.5 * vocabulary
    state = torch.export.load(folder / "pt2" / "text.pt2").state_dict
    assert not any("crossattention" in key for key in state) and not any("itm_head" in key for key in state)


# ---- the exporter ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(folder):
    """A model of the table that `folder` has added to."""
    torch.manual_seed(0)
    med = tiny_med(hidden_size=32, num_hidden_layers=1, max_position_embeddings=40)
    return tiny_model(vit="atom", image_size=60, patch_size=20, med_config=med).eval().requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["onnx", "export2"])
def test_half_precision_says_its_error(small_model, tmp_path, kind, precision):
    model, dtype = small_model, exported.DTYPES[precision]
    part = TextPart(model, dtype, kind == "onnx" and precision == "bf16")
    lines = write_graphs(tmp_path / "half", kind, [lambda: part], model, {}, blip_tokenizer(), "", exact=False)
    difference = json.loads((tmp_path / "half" / "preprocess.json").read_text())["largest_difference"]["text.feature"]
    assert f"largest difference feature {difference:.1e}" in lines[0]
    assert 1e-5 < difference < 0.1
    half = (tmp_path / "half" / f"text{graphs.SUFFIX[kind]}").stat().st_size
    assert half < 0.6 * sum(p.numel() * 4 for p in part.parameters())


def test_stored_only_rounds_weights_and_computes_in_float32(small_model):
    model = small_model
    text = TokenizedText(torch.tensor([[101, 7, 102]]), torch.ones(1, 3, dtype=torch.int64))
    got = Encoder(copy.deepcopy(model.text_encoder), torch.bfloat16, stored_only=True)(text, cls_only=True)
    with torch.no_grad():
        for parameter in model.text_encoder.parameters():
            parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(got, model.text_encoder(text, cls_only=True), rtol=0, atol=0)


def test_a_graph_that_computes_something_else_is_not_written(small_model, tmp_path):
    class Wrong(ImagePart):
        def forward(self, image):
            tokens, feature = super().forward(image)
            return tokens * 1.001, feature

    model = small_model
    parts = [partial(part, model, torch.float32, False) for part in (TextPart, Wrong)]
    with pytest.raises(ValueError, match="image: tokens differs from the model's by 0.00.*Nothing was written"):
        write_graphs(tmp_path / "new", "export2", parts, model, {}, blip_tokenizer(), "", exact=True)
    assert list(tmp_path.iterdir()) == []


def test_every_part_is_compared_at_other_sizes_than_traced(small_model):
    model, seen = small_model, []
    part = MatchPart(model, torch.float32, False)

    def run(*inputs):
        seen.append(tuple(inputs[0].shape))
        return [x.numpy() for x in part.expected(model, *inputs)]

    assert compare(run, part, model, exact=True)["logits"][0] == 0
    assert seen == [(1, 2), (3, 35)] == list(VERIFIED) and graphs.TRACED not in seen
    with pytest.raises(ValueError, match="logits has values that are not finite: use --precision bf16"):
        compare(lambda *inputs: [np.full((len(inputs[0]), 2), np.nan)], part, model, exact=False)
    with pytest.raises(ValueError, match=r"logits is \(2, 2\), the model's \(1, 2\)"):
        compare(lambda *inputs: [np.zeros((2, 2))], part, model, exact=False)


def test_a_graph_that_ignored_its_mask_would_be_noticed(small_model):
    model = small_model
    ids, mask = TextPart(model, torch.float32, False).example(5, 35)
    assert mask[0].all() and not mask.all() and (mask.sum(1) >= 2).all()
    masked, full = (model.text_feature(model.encode_text(TokenizedText(ids, x))) for x in (mask, torch.ones_like(mask)))
    assert (masked - full).abs().max() > 1e-3


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(part, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(graphs.WRITERS, "export2", full)
    assert main(["export2", str(folder / "run"), str(tmp_path / "new")]) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_config_gives_what_the_file_does_not_say(folder, tmp_path, capsys):
    data = torch.load(folder / "run" / "checkpoint_best.pth")
    torch.save({"model": data["model"]}, tmp_path / "bare.pth")
    assert main(["export2", str(tmp_path / "bare.pth"), str(tmp_path / "new")]) == 2
    assert "give --config" in capsys.readouterr().err
    med = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    (tmp_path / "med.json").write_text(json.dumps(med | {"max_position_embeddings": 40}))
    sizes = "vit: atom\npatch_size: 20\nimage_size: 80\nembed_dim: 32"
    text = f"dataset: scenes\nimage_root: x\n{sizes}\nmed_config: {tmp_path}/med.json\n"
    (tmp_path / "c.yaml").write_text(text)
    args = ["export2", str(tmp_path / "bare.pth"), str(tmp_path / "new"), "--config", str(tmp_path / "c.yaml")]
    assert main(args) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "new" / "preprocess.json").read_text())["image"]["size"] == 80


def test_what_is_there_is_not_mixed_with(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    assert main(["export2", str(folder / "run"), str(tmp_path / "full")]) == 2
    assert "full: there is something already; name a new one" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["a.txt"]


def test_absent_packages_are_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        graphs.importlib.util, "find_spec", lambda name: None if name in ("onnx", "onnxscript") else find(name)
    )
    assert main(["onnx", "nowhere.pth", str(tmp_path / "new")]) == 2
    wanted = "ONNX needs onnx, onnxscript, which is not installed: pip install -r requirements-export.txt"
    assert wanted in capsys.readouterr().err
    assert main(["export2", "nowhere.pth", str(tmp_path / "new")]) == 2  # needs none of them
    assert "nowhere.pth: there is no such file" in capsys.readouterr().err
