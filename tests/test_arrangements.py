"""Texts without padding against the plain rectangle: same states, same gradients, with and without an image."""

import pytest
import torch

from models.arrangements import TrainingTexts
from models.med import BertModel
from tests.conftest import random_captions, tiny_med
from transform.text import MAX_TOKENS, tokenize

CPU = torch.device("cpu")


@pytest.mark.parametrize("captions", [random_captions(7), ["a dog", "a cat", "red man"], ["", "table"]])
@pytest.mark.parametrize("with_image", [True, False])
def test_equals_padded_texts(captions, with_image):
    model = BertModel(tiny_med(encoder_width=48)).double()
    text = tokenize(captions)
    lengths = text.attention_mask.sum(1).tolist()
    wide = type(text)(*(torch.nn.functional.pad(x, (0, MAX_TOKENS - x.shape[1])) for x in text))
    image_of_text = sorted([3, 1, 1, 0, 3, 3, 1][: len(captions)])  # image 2 has no text
    tokens = [torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(1)).double().requires_grad_() for _ in "ab"]
    arrangements = (None, TrainingTexts(lengths, CPU, image_of_text, 4))
    results = []
    for padded, image_tokens, arrangement in zip((text, wide), tokens, arrangements, strict=True):
        if not with_image:
            seen, arrangement = None, arrangement and TrainingTexts(lengths, CPU)
        else:  # the plain way takes an image for each text
            seen = image_tokens if arrangement else image_tokens[image_of_text]
        model.zero_grad()
        states = model(padded, seen, arrangement, cls_only=True)
        assert states.shape == (len(captions), 1, 64)
        states.square().sum().backward()
        results.append((states, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-10, atol=1e-12, msg=name)
    if with_image:
        torch.testing.assert_close(tokens[0].grad, tokens[1].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])  # one: first tokens alone
def test_a_popular_image_has_its_own_call(layers):
    """One image of eight that most texts look at: the rectangle does not grow to its size, gradients are the same."""
    image_of_text = [0, 1, 2, *[3] * 37, 4, 6, 6, 7]
    text = tokenize(random_captions(len(image_of_text), torch.Generator().manual_seed(2)))
    lengths = text.attention_mask.sum(1).tolist()
    arrangement = TrainingTexts(lengths, CPU, image_of_text, 8)
    assert [list(crowd.popular) for crowd in arrangement.crowds] == [[3], [3]]
    popular = sum(length for length, image in zip(lengths, image_of_text, strict=True) if image == 3)
    assert arrangement.crowds[0].size <= 8 * 4 * -(-sum(lengths) // 8) + popular
    model = BertModel(tiny_med(encoder_width=48, num_hidden_layers=layers)).double()
    tokens = torch.randn(8, 5, 48).double().requires_grad_()
    results = []
    for seen, texts in ((tokens[image_of_text], None), (tokens, arrangement)):
        model.zero_grad()
        tokens.grad = None
        states = model(text, seen, texts, cls_only=True)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        results.append((states, tokens.grad, *(p.grad for p in model.parameters() if p.grad is not None)))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_images_must_ascend_and_only_first_states_come_out():
    with pytest.raises(AssertionError, match="order"):
        TrainingTexts([2, 3], CPU, [1, 0], 2)
    model = BertModel(tiny_med())
    with pytest.raises(AssertionError, match="cls_only"):
        model(tokenize(["a dog", "cat"]), arrangement=TrainingTexts([4, 3], CPU))
