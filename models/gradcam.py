"""Where matching looks: Grad-CAM of the cross-attention, for each word of a text.

Sources: Selvaraju et al. 2017 (Grad-CAM); as ALBEF (Li et al. 2021, `visualization.ipynb`) and LAVIS
(`compute_gradcam`) apply it to a matching head. A are the attention probabilities of one layer, G the gradient of the
matching logit by them. A map is the mean over heads of A * max(G, 0): what was looked at and spoke for a match.

Shapes: P texts of L tokens, H heads, n = 1 + g^2 image tokens, V image width, W words.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from models.arrangements import HeatmapTexts
from models.blip_retrieval import BLIP_Retrieval
from transform.text import TokenizedText

LAYER, OF_LAYERS = 7, 12  # ALBEF shows layer 8 of its 12, LAVIS 7 of BLIP's


class Heatmap(NamedTuple):
    """Maps of one picture and one text; all values are at least 0, and on one scale."""

    words: list[str]  # W, as the tokenizer divides the cleaned text
    maps: Tensor  # (W, g, g), the mean over a word's pieces
    sentence: Tensor  # (g, g), the mean over all pieces
    match: float  # P(match)
    layer: int


def token_maps(model: BLIP_Retrieval, image_tokens: Tensor, text: TokenizedText, layer: int) -> tuple[Tensor, Tensor]:
    """Maps (P, L, g, g), zero for padding, and matching logits (P, 2); text p looks at image p of (P, n, V).

    ValueError for a layer that the text encoder does not have, or its last, where only [ENC] looks at the image.
    """
    depth = len(model.text_encoder.encoder.layer)
    if not 0 <= layer < depth - 1:
        raise ValueError(
            f"layer {layer}: this text encoder has the layers 0 to {depth - 1}, and in the last one only [ENC] looks "
            f"at the image; choose one from 0 to {depth - 2}"
        )
    texts = HeatmapTexts(text.attention_mask, layer)
    with torch.enable_grad():
        logits = model.match(text, image_tokens, texts)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), texts.attention)
    attention = texts.attention.detach()  # (P, H, L, n)
    maps = (attention * gradient.clamp(min=0)).mean(1)[..., 1:]  # (P, L, g^2): without the image's [CLS]
    side = isqrt(maps.shape[2])
    return (maps * text.attention_mask[:, :, None]).unflatten(2, (side, side)), logits.detach()


def default_layer(model: BLIP_Retrieval) -> int:
    """LAYER, or the layer at about the same depth of another encoder."""
    depth = len(model.text_encoder.encoder.layer)
    return max(0, min(LAYER * depth // OF_LAYERS, depth - 2))


def word_heatmap(model: BLIP_Retrieval, image_tokens: Tensor, caption: str, layer: int | None = None) -> Heatmap:
    """Maps of one picture, (1, n, V), and one cleaned caption; ValueError for a caption without words."""
    tokenizer = model.tokenizer
    encoding = tokenizer.bert(caption, truncation=True, max_length=tokenizer.max_tokens, return_tensors="pt")
    text = TokenizedText(encoding["input_ids"], encoding["attention_mask"]).to(image_tokens.device)
    word_of_token = encoding.word_ids(0)  # None for [CLS] and [SEP]
    tokens_of_word: dict[int, list[int]] = {}
    for token, word in enumerate(word_of_token):
        if word is not None:
            tokens_of_word.setdefault(word, []).append(token)
    if not tokens_of_word:
        raise ValueError(f"the caption {caption!r} has no words to draw a heatmap for")
    layer = default_layer(model) if layer is None else layer
    maps, logits = token_maps(model, image_tokens, text, layer)
    words = [caption[slice(*encoding.word_to_chars(0, word))] for word in tokens_of_word]
    by_word = torch.stack([maps[0, tokens].mean(0) for tokens in tokens_of_word.values()])  # (W, g, g)
    sentence = maps[0, 1:-1].mean(0)  # without [ENC] and [SEP]
    return Heatmap(words, by_word.cpu(), sentence.cpu(), float(logits.softmax(-1)[0, 1]), layer)
