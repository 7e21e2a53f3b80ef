"""The text encoder against transformers' BlipTextModel: same names, same outputs, same gradients."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from configs.sizes import load_med_config
from models.arrangements import PlainTexts, TrainingTexts
from models.med import BertModel
from tests.conftest import random_captions, tiny_med
from transform.text import tokenize


def pair_of_models(width: int):
    config = tiny_med(encoder_width=width)
    ours = BertModel(config).eval()
    theirs = BlipTextModel(
        BlipTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            encoder_hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            layer_norm_eps=config.layer_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"embeddings.position_ids"}
    return ours, theirs


def compare(out, expected, ours, theirs):
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None and not name.endswith("key.bias"):
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-4, rtol=1e-4, msg=name)


def test_text_alone():
    ours, theirs = pair_of_models(48)
    text = tokenize(random_captions(5))
    expected = theirs(input_ids=text.input_ids, attention_mask=text.attention_mask, is_decoder=False)[0][:, 0]
    compare(ours(text)[:, 0], expected, ours, theirs)


def test_text_with_image_tokens():
    ours, theirs = pair_of_models(48)
    text, image_tokens = tokenize(random_captions(5)), torch.randn(5, 7, 48)
    expected = theirs(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=image_tokens,
        encoder_attention_mask=torch.ones(5, 7),
        is_decoder=False,
    )[0][:, 0]
    compare(ours(text, image_tokens, cls_only=True)[:, 0], expected, ours, theirs)


@torch.no_grad()
def test_shortcuts_are_exact():
    """One [CLS] query in the last layer, no mask without padding."""
    model = BertModel(tiny_med(encoder_width=48)).double().eval()
    text, image_tokens = tokenize(random_captions(6)), torch.randn(6, 7, 48).double()
    full = model(text, image_tokens)
    torch.testing.assert_close(model(text, image_tokens, cls_only=True), full[:, :1], atol=1e-12, rtol=0)
    for i, length in enumerate(text.attention_mask.sum(1).tolist()):
        alone = type(text)(*(x[i : i + 1, :length] for x in text))
        states = model(alone, arrangement=PlainTexts(attention_mask=None), cls_only=True)
        torch.testing.assert_close(states[0], model(text)[i, :1], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hidden_size": 64,', "not valid JSON"),
        (json.dumps({"hiden_size": 64}), "hiden_size"),
        (json.dumps({"hidden_act": "relu"}), "hidden_act"),
        (json.dumps({"hidden_size": 65, "num_attention_heads": 4}), "not a multiple"),
        (None, "no file"),
    ],
)
def test_bad_config_names_the_file_and_the_key(tmp_path, content, message):
    path = tmp_path / "med.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_med_config(path)
    assert "med.json" in str(error.value)


def test_the_published_config_loads():
    config = load_med_config("configs/med_config.json")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 12, 30524)


@pytest.mark.parametrize("arranged", [False, True])
def test_under_autocast_image_tokens_are_cast_once_and_nothing_changes(arranged):
    """Against the layers in a loop, whose products cast for themselves: the same bits, gradients included."""
    model = BertModel(tiny_med(encoder_width=48, num_hidden_layers=2))
    text = tokenize(random_captions(4))
    results = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        leaf = torch.randn(4, 7, 48).requires_grad_()
        tokens = leaf.clone()  # autocast keeps casts of leaves by itself, as those of weights
        lengths = text.attention_mask.sum(1).tolist()
        texts = TrainingTexts(lengths, tokens.device, range(4), 4) if arranged else PlainTexts(text.attention_mask)
        model.zero_grad()
        cast = []
        with torch.autocast("cpu", dtype=torch.bfloat16), _casts_of(tokens, cast):
            if by_hand:
                x = texts.pack(model.embeddings(text.input_ids))
                for i, layer in enumerate(model.encoder.layer):
                    x = layer.image_part(layer.text_part(x, texts, i == 1), texts, tokens)
                states = texts.unpack(x)
            else:
                states = model(text, tokens, texts, cls_only=True)
        states.float().square().sum().backward()
        results.append((states, leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)))
        assert len(cast) == (4 if by_hand else 1)
    for by_hand, ours in zip(*results, strict=True):
        assert torch.equal(by_hand, ours)


class _casts_of(TorchDispatchMode):
    """Notes each cast of a tensor of that shape."""

    def __init__(self, tensor, cast):
        super().__init__()
        self.shape, self.cast = tensor.shape, cast

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.cast.append(func)
        return func(*args, **(kwargs or {}))
