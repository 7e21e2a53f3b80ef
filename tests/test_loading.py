"""`models.load`: equal to evaluation, forgiving of inputs, for every layout of file; and docs/python.md, run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

import models
import models.loading
from checkpoints.__main__ import export_folder
from checkpoints.runs import RunState, save_checkpoint, save_run
from models import load
from models.blip_retrieval import BLIP_Retrieval
from models.loading import Blip
from retrieval.rerank import score_matrices
from tests.conftest import random_captions, tiny_med, tiny_model
from transform.image import eval_transform
from transform.text import tokenize

ROOT = Path(__file__).parent.parent
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PUBLISHED = {"hidden_size": 128, "num_attention_heads": 2}  # heads 64 wide, as in the released files


def drawn(count: int, size: tuple[int, int] = (50, 40), mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert(mode) for _ in range(count)]


def save(path: Path, model: BLIP_Retrieval, **extra) -> Path:
    """As training saves it."""
    torch.save({"model": model.state_dict(), "text_config": asdict(model.text_encoder.config), **extra}, path)
    return path


@pytest.fixture
def model() -> BLIP_Retrieval:
    """Twins apart from the online weights, as after training."""
    model = tiny_model()
    with torch.no_grad():
        for _, twin in model.twins():
            for parameter in twin.parameters():
                parameter.add_(0.1)
    return model.eval()


@pytest.fixture
def blip(model, tmp_path) -> Blip:
    return load(save(tmp_path / "a.pth", model))


def pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([eval_transform(32)(image) for image in images])


# ---- equal to evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_similarity_is_the_cosine_of_evaluation(blip, model):
    images, texts = drawn(5), random_captions(7)
    image_feat = model.image_feature(model.encode_image(pixels(images)))
    text_feat = torch.cat([model.text_feature(model.encode_text(tokenize([text]))) for text in texts])
    torch.testing.assert_close(blip.image_features(images), image_feat, **CLOSE)
    torch.testing.assert_close(blip.text_features(texts), text_feat, **CLOSE)
    torch.testing.assert_close(blip.similarity(images, texts), image_feat @ text_feat.T, **CLOSE)


def test_scores_are_those_of_evaluation(blip, model):
    images, texts = drawn(5), random_captions(7)
    i2t, t2i = score_matrices(model, pixels(images), texts, k_test=7)
    score = blip.score(images, texts)
    torch.testing.assert_close(score, i2t, **CLOSE)
    torch.testing.assert_close(score, t2i.T, **CLOSE)
    assert score.std() > 1e-2  # the comparison is of something


@torch.no_grad()
def test_match_is_the_softmax_of_the_logits(blip, model):
    images, texts = drawn(3), random_captions(4)
    tokens = model.encode_image(pixels(images))
    columns = [model.match(tokenize([text] * 3), tokens).softmax(1)[:, 1] for text in texts]
    torch.testing.assert_close(blip.match(images, texts), torch.stack(columns, 1), **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_pairs_and_batches_change_nothing(blip, batch_size, monkeypatch):
    images, texts = drawn(5), random_captions(5)
    score, match = blip.score(images, texts), blip.match(images, texts)
    blip.batch_size = batch_size
    monkeypatch.setattr(models.loading, "TEXTS_PER_PASS", batch_size)
    torch.testing.assert_close(blip.score(images, texts), score, **CLOSE)
    torch.testing.assert_close(blip.match(images, texts), match, **CLOSE)
    torch.testing.assert_close(blip.score(images, texts, pairwise=True), score.diagonal(), **CLOSE)
    torch.testing.assert_close(blip.match(images, texts, pairwise=True), match.diagonal(), **CLOSE)


def test_pairs_of_unequal_number_are_refused(blip):
    with pytest.raises(ValueError, match="as many images as texts, got 2 and 3"):
        blip.match(drawn(2), random_captions(3), pairwise=True)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_sentences_are_cleaned_and_cut(blip):
    image = drawn(1)
    plain = blip.score(image, "a red ball on a table")
    assert torch.equal(blip.score(image, '  A RED "ball"; on   a Table!!'), plain)
    long = " ".join(["red"] * 30)
    assert torch.equal(blip.text_features(long), blip.text_features(long + " and much more"))


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "I;16", "CMYK", "1"])
@pytest.mark.parametrize("kind", ["picture", "path", "text path"])
def test_pictures_of_any_mode_and_paths(blip, tmp_path, mode, kind):
    if mode == "I;16":
        grey = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32
        image, rgb = Image.fromarray(grey), Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    else:
        image = drawn(1, mode=mode)[0]
        rgb = image.convert("RGB")
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    given = {"picture": image, "path": path, "text path": str(path)}[kind]
    assert torch.equal(blip.image_features(given), blip.image_features(rgb))


def test_a_picture_is_squeezed_and_not_turned(blip, tmp_path):
    image = drawn(1, (20, 90))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(blip.pixels(tmp_path / "a.png"), pixels([image]))


def test_one_counts_as_a_list_of_one(blip):
    (image,), text = drawn(1), "a dog"
    assert blip.similarity(image, text).shape == blip.match(image, text).shape == blip.score([image], [text]).shape
    assert blip.match(image, text, pairwise=True).shape == (1,) and blip.pixels(image).shape == (1, 3, 32, 32)
    assert blip.image_features(image).shape == blip.text_features(text).shape == (1, 32)
    assert torch.equal(blip.similarity((image,), (text,)), blip.similarity(image, text))


def test_empty_lists(blip):
    for method in (blip.similarity, blip.match, blip.score):
        assert method([], ["a", "b"]).shape == (0, 2)
        assert method(drawn(3), []).shape == (3, 0)
        assert method([], []).shape == (0, 0)
    assert blip.match([], [], pairwise=True).shape == (0,)
    assert blip.image_features([]).shape == blip.text_features([]).shape == (0, 32)
    assert blip.pixels([]).shape == (0, 3, 32, 32)
    assert blip.text_features("...").shape == (1, 32)  # nothing is left of it


@pytest.mark.parametrize(("content", "words"), [(b"no picture", "cannot be read"), (b"", "cannot be read")])
def test_unreadable_pictures_are_named(blip, tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"image {tmp_path}/a.png {words}"):
        blip.image_features(tmp_path / "a.png")
    drawn(1)[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    for name in ("cut.png", "absent.png"):
        with pytest.raises(ValueError, match=name):
            blip.image_features(tmp_path / name)


def test_an_array_is_no_picture(blip):
    with pytest.raises(ValueError, match="got ndarray; PIL's Image.fromarray"):
        blip.image_features(np.zeros((40, 50, 3), np.uint8))


def test_eval_mode_no_gradient_and_features_one_can_train_on(blip):
    assert not any(module.training for module in blip.model.modules())
    assert not any(parameter.requires_grad for parameter in blip.model.parameters())
    head = torch.nn.Linear(32, 2)
    for feat in (blip.image_features(drawn(2)), blip.text_features(["a", "b"])):
        assert not feat.requires_grad and feat.dtype == torch.float32 and feat.device.type == "cpu"
        head(feat).sum().backward()
    (blip.score(drawn(2), ["a", "b"]) @ torch.ones(2, 1, requires_grad=True)).sum().backward()


# ---- layouts --------------------------------------------------------------------------------------------------------


def assert_equal_models(blip: Blip, model: BLIP_Retrieval) -> None:
    state = blip.model.state_dict()
    for key, value in model.state_dict().items():
        if "_m." not in key and not key.endswith("_queue"):
            assert torch.equal(state[key], value), key
    assert blip.model.text_encoder.config == model.text_encoder.config
    images, texts = drawn(2), random_captions(2)
    model.eval()
    torch.testing.assert_close(blip.score(images, texts), score_matrices(model, pixels(images), texts, 2)[0], **CLOSE)


def test_run_folder(tmp_path):
    newest, older, best = tiny_model(), tiny_model(), tiny_model(embed_dim=16)
    optimizer = torch.optim.SGD(best.parameters())
    save_run(tmp_path, older, optimizer, {}, RunState(epoch=0, step=9), keep_last=3)
    save_run(tmp_path, newest, optimizer, {}, RunState(epoch=1, step=0), keep_last=3)
    assert_equal_models(load(tmp_path), newest)
    save_checkpoint(tmp_path / "checkpoint_best.pth", best, optimizer, {}, 0)
    assert_equal_models(load(tmp_path), best)
    assert_equal_models(load(str(tmp_path / "checkpoint_best.pth")), best)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="nor a run folder .it has neither checkpoint_best.pth"):
        load(tmp_path / "none")


def test_bare_state_dict_as_released(tmp_path):
    model = tiny_model(med_config=tiny_med(**PUBLISHED, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    state = dict(model.state_dict())
    for name in ("text_encoder", "text_encoder_m"):
        state[f"{name}.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": {key: value for key, value in state.items() if "_m." not in key}}, tmp_path / "no_twins.pth")
    for name in ("bare.pth", "no_twins.pth"):
        assert_equal_models(load(tmp_path / name), model)


def test_heads_that_no_rule_tells_are_asked_for(tmp_path):
    model = tiny_model(med_config=tiny_med(hidden_size=48))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: does not say how many attention heads.*--config .*config="):
        load(tmp_path / "a.pth")
    (tmp_path / "med.json").write_text(json.dumps(asdict(model.text_encoder.config)))
    config = {"dataset": "scenes", "image_root": "x", "image_size": 32, "embed_dim": 32, "vit": "nano"}
    YAML().dump(config | {"med_config": str(tmp_path / "med.json")}, tmp_path / "c.yaml")
    assert_equal_models(load(tmp_path / "a.pth", config=tmp_path / "c.yaml"), model)
    YAML().dump(config | {"med_config": str(tmp_path / "med.json"), "image_size": 64}, tmp_path / "c.yaml")
    assert load(tmp_path / "a.pth", config=tmp_path / "c.yaml").pixels(drawn(1)).shape == (1, 3, 64, 64)


def test_what_the_yaml_leaves_to_weights_is_the_files(tmp_path):
    model = tiny_model()
    save_checkpoint(tmp_path / "a.pth", model, torch.optim.SGD(model.parameters()), {}, 0)
    config = {"dataset": "scenes", "image_root": "x", "image_size": 32, "embed_dim": 32, "image_tower": "v.pth"}
    YAML().dump(config | {"vit": "auto", "med_config": "auto", "text_tower": "bert"}, tmp_path / "c.yaml")
    assert_equal_models(load(tmp_path / "a.pth", config=tmp_path / "c.yaml"), model)


def test_unknown_image_encoder_is_named_with_its_file(tmp_path):
    state = {key: value for key, value in tiny_model().state_dict().items() if "visual_encoder.blocks.5" not in key}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: ViT-unknown \(96 wide, 5 deep\) has an unknown number of heads"):
        load(tmp_path / "a.pth")


def test_hugging_face_folder(tmp_path, model):
    export_folder(str(save(tmp_path / "a.pth", model)), tmp_path / "hf")
    assert_equal_models(load(tmp_path / "hf"), model)
    images, texts = drawn(3), random_captions(3)
    assert torch.equal(load(tmp_path / "hf").score(images, texts), load(tmp_path / "a.pth").score(images, texts))


def test_half_precision_file_computes_in_float32(tmp_path):
    model = tiny_model().half()
    blip = load(save(tmp_path / "a.pth", model))
    assert {value.dtype for value in blip.model.state_dict().values()} == {torch.float32, torch.int64}
    assert_equal_models(blip, model.float())


def test_nothing_is_drawn_and_twins_take_no_memory(tmp_path, model):
    path = save(tmp_path / "a.pth", model)
    before = torch.get_rng_state()
    blip = load(path)
    assert torch.equal(torch.get_rng_state(), before)  # no random weights that the file's would overwrite
    state = blip.model.state_dict()
    assert not any(value.is_meta for value in state.values())
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    online = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert online <= sum(held.values()) < 1.01 * online
    path.write_bytes(bytes(path.stat().st_size))  # nor is it mapped from the file
    assert torch.equal(blip.model.vision_proj.weight, model.vision_proj.weight)


# ---- arguments, and where it is called from -------------------------------------------------------------------------


def test_bf16_is_near_fp32(blip, tmp_path):
    images, texts = drawn(4), random_captions(4)
    fast = load(tmp_path / "a.pth", device=torch.device("cpu"), precision="bf16")
    assert fast.score(images, texts).dtype == fast.similarity(images, texts).dtype == torch.float32
    difference = (fast.score(images, texts) - blip.score(images, texts)).abs().max()
    assert 0 < difference < 0.2
    assert (fast.similarity(images, texts) - blip.similarity(images, texts)).abs().max() < 0.02
    assert fast.model.autocast_dtype is None and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("arguments", "words"), [
    ({"precision": "fp16"}, "precision must be one of fp32, tf32, bf16, got 'fp16'"),
    ({"device": "gpu"}, "device 'gpu' is unknown: use cpu, cuda or cuda:N"),
    ({"device": "cuda:99"}, "device cuda:99: this PyTorch sees [0-9]+ CUDA devices"),
])  # fmt: skip
def test_arguments_that_cannot_be(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "not even looked for", **arguments)


def test_it_is_a_function_after_its_module_was_imported():
    from models import load as again

    assert again is load is models.loading.load and callable(models.load)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = models.lode


def test_from_another_working_directory(tmp_path, blip):
    drawn(1)[0].save(tmp_path / "a.png")
    code = "from models import load; print(load('a.pth').score('a.png', 'a dog').item())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(blip.score(tmp_path / "a.png", "a dog").item(), abs=1e-5)


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_its_blocks():
    assert len(BLOCKS) == 6 and all(block.count("\n") <= 14 for block in BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_of_the_page_run_as_written(tmp_path, monkeypatch, capsys, number):
    (tmp_path / "output" / "mine").mkdir(parents=True)
    save(tmp_path / "output" / "mine" / "checkpoint_best.pth", tiny_model())
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(drawn(6)):
        picture.save(tmp_path / "pictures" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"docs/python.md, block {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out  # every block shows something
