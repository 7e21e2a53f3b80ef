"""Heatmaps of matching: against full autograd through transformers' eager class, and the drawing of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

import heatmap as program
import train_retrieval
from benchmarks.heatmaps_on_scenes import measure, objects
from data.scenes import COLOURS
from models import load
from models.arrangements import HeatmapTexts
from models.gradcam import default_layer, token_maps, word_heatmap
from models.loading import Blip
from reports.heatmaps import draw_heatmap, overlay
from tests.conftest import random_captions, tiny_med, tiny_model
from transform.text import ENC, tokenize


def oracle(model, image_tokens, text, layer: int) -> torch.Tensor:
    """The formula in plain lines, on transformers' class with its own eager attention and a graph through all of it."""
    ours = model.text_encoder
    theirs = BlipTextModel(
        BlipTextConfig(
            vocab_size=ours.config.vocab_size, hidden_size=ours.config.hidden_size,
            encoder_hidden_size=image_tokens.shape[2], intermediate_size=ours.config.intermediate_size,
            num_hidden_layers=ours.config.num_hidden_layers, num_attention_heads=ours.config.num_attention_heads,
            max_position_embeddings=ours.config.max_position_embeddings, layer_norm_eps=ours.config.layer_norm_eps,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).to(image_tokens.dtype).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=False)
    kept = []

    def keep(module: nn.Module, inputs: tuple, output) -> None:
        inputs[0].retain_grad()
        kept.append(inputs[0])

    # Dropout stands right behind the probabilities, and does nothing here.
    theirs.encoder.layer[layer].crossattention.self.dropout.register_forward_hook(keep)
    ids = text.input_ids.clone()
    ids[:, 0] = ENC
    states = theirs(
        input_ids=ids, attention_mask=text.attention_mask, encoder_hidden_states=image_tokens,
        encoder_attention_mask=torch.ones(image_tokens.shape[:2]), is_decoder=False,
    )[0]  # fmt: skip
    model.itm_head(states[:, 0])[:, 1].sum().backward()
    (attention,) = kept
    maps = (attention * attention.grad.clamp(min=0)).mean(1)[:, :, 1:]
    side = int((maps.shape[2]) ** 0.5)
    return (maps * text.attention_mask[:, :, None]).reshape(*maps.shape[:2], side, side).detach()


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_equal_full_autograd_through_transformers(layer):
    model = tiny_model(torch.float64, image_size=64).eval()
    text, image_tokens = tokenize(random_captions(5)), torch.randn(5, 17, 96, dtype=torch.float64)
    maps, logits = token_maps(model, image_tokens, text, layer)
    expected = oracle(model, image_tokens, text, layer)
    assert maps.shape == (5, text.input_ids.shape[1], 4, 4) and maps.max() > 0
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=4e-16)
    torch.testing.assert_close(logits, model.match(text, image_tokens).detach())


def test_the_layers_below_have_no_graph_and_weights_get_no_gradient():
    model = tiny_model().eval().requires_grad_(False)
    text, image_tokens = tokenize(["a dog"]), torch.randn(1, 5, 96)
    with torch.no_grad():
        maps, _ = token_maps(model, image_tokens, text, 1)
    assert not maps.requires_grad and all(p.grad is None for p in model.parameters())
    texts = HeatmapTexts(text.attention_mask, 1)
    assert model.match(text, image_tokens, texts).grad_fn is not None and texts.attention.is_leaf


def test_words_are_means_of_their_pieces_and_the_sentence_of_all():
    blip = Blip(tiny_model(image_size=64).eval().requires_grad_(False))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    found = blip.heatmap(picture, "A dog playing dachshund!")
    assert found.words == ["a", "dog", "playing", "dachshund"] and found.layer == default_layer(blip.model) == 1
    text, image_tokens = blip.tokens("a dog playing dachshund"), blip.model.encode_image(blip.pixels(picture))
    maps, logits = token_maps(blip.model, image_tokens, text, 1)
    pieces = text.input_ids.shape[1] - 5  # of the last word
    assert pieces > 1
    torch.testing.assert_close(found.maps[3], maps[0, 4 : 4 + pieces].mean(0))
    torch.testing.assert_close(found.sentence, maps[0, 1:-1].mean(0))
    assert found.match == pytest.approx(float(blip.match(picture, "a dog playing dachshund")), abs=1e-5)


def test_a_caption_of_any_length_is_drawn():
    blip = Blip(tiny_model(image_size=64).eval().requires_grad_(False))
    picture = Image.new("RGB", (64, 64), "red")
    for text, words in (("dog", 1), (" ".join(["dog"] * 60), 30), ("supercalifragilistic " * 20, None)):
        found = blip.heatmap(picture, text)
        assert len(found.words) == (words or len(found.words)) and len(found.maps) == len(found.words)
        assert draw_heatmap(picture, found).width > 300
    for empty in ("", "..."):
        with pytest.raises(ValueError, match="has no words"):
            blip.heatmap(picture, empty)


@pytest.mark.parametrize("layer", [-1, 2, 12])
def test_layers_that_cannot_be_are_refused(layer):
    with pytest.raises(ValueError, match=f"layer {layer}: this text encoder has the layers 0 to 2.*from 0 to 1"):
        word_heatmap(tiny_model().eval(), torch.randn(1, 5, 96), "a dog", layer)


def test_strength_is_on_one_scale_and_nothing_divides_by_zero():
    image = Image.new("RGB", (40, 40), (10, 20, 30))
    values = torch.zeros(4, 4)
    np.testing.assert_array_equal(np.asarray(overlay(image, values, 0.0)), np.asarray(image))
    values[0, 0] = 1.0
    weak, strong = (np.asarray(overlay(image, values, scale)).astype(int) for scale in (4.0, 1.0))
    assert strong[2, 2, 0] > weak[2, 2, 0] > 10 and (strong[30, 30] == [10, 20, 30]).all()


def test_the_program_draws_and_stores(tmp_path, capsys):
    model = tiny_model(med_config=tiny_med(), image_size=64)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "a.png")
    args = [str(tmp_path / "w.pth"), str(tmp_path / "a.png"), "A red dog."]
    assert program.main([*args, "-o", str(tmp_path / "out.png"), "--layer", "0"]) == 0
    assert Image.open(tmp_path / "out.png").width > 300
    assert program.main([*args, "-o", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["words"].tolist() == ["a", "red", "dog"] and file["maps"].shape == (3, 4, 4)
        assert file["sentence"].shape == (4, 4) and 0 <= float(file["match"]) <= 1 and int(file["layer"]) == 1
    capsys.readouterr()
    assert program.main([args[0], args[1], "dog " * 30 + "cat émoji", "-o", str(tmp_path / "o.png")]) == 0
    assert "reads 30 words at most; not drawn: cat émoji" in capsys.readouterr().err
    for wrong, said in (
        ([*args, "-o", str(tmp_path / "out.pdf")], "ends in .png or .npz"),
        ([*args, "--layer", "9"], "layer 9"),
        ([args[0], str(tmp_path / "none.png"), "a dog"], "none.png cannot be read"),
    ):
        assert program.main(wrong) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_colour_words_lie_on_their_object(tmp_path):
    """In the layer drawn by default, trained on `scenes` for one epoch; by chance a ninth of a map is in the cell."""
    args = ["--config", "configs/retrieval_scenes.yaml", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    keys = ["max_epoch=1", "eval_before=false", "num_workers=0"]
    assert train_retrieval.main([*args, "--set", *keys]) == 0
    blip = load(tmp_path / "run")
    found = measure(blip, tmp_path / "run", captions=150, layer=default_layer(blip.model))["colour"]
    assert len(found) > 150
    share, highest = found.mean(0)
    assert share > 3 / 9 and highest > 4 / 9


def test_objects_are_found_in_their_cells():
    pixels = np.full((60, 60, 3), 128, np.uint8)
    pixels[5:15, 45:55] = COLOURS["red"]
    pixels[42:56, 3:17] = COLOURS["blue"]
    caption = "a small red star to the right of a large blue ring"
    assert list(objects(caption, pixels)) == [(("small", "red", "star"), 2), (("large", "blue", "ring"), 6)]
    assert list(objects("a small red star above a large red ring", pixels)) == []
