"""Ways to score pairs that `bench_evaluate.py` times against `retrieval/rerank.py`, all on the same weights.

The published loop, transformers with image tokens cached, and the restructurings of `retrieval/scoring.py`, each added
to those before it.

Shapes: B images and C texts of a small gallery, P pairs of a call, n image tokens, V image width, T text tokens.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.published import pair_scores
from checkpoints.huggingface import write_folder
from models.arrangements import PlainTexts, ScoringTexts
from models.blip_retrieval import BLIP_Retrieval, as_match_input
from retrieval.scoring import EncodedImages, EncodedTexts, score_pairs
from transform.text import TokenizedText

STEPS = ("keys and values once", "no padding", "[ENC] alone", "layer 0 once")


def load_transformers(model: BLIP_Retrieval) -> nn.Module:
    """transformers' class with the same weights."""
    from transformers import BlipForImageTextRetrieval

    with tempfile.TemporaryDirectory() as folder:
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        write_folder(Path(folder) / "hf", state, model.text_encoder.config, "the benchmark's model")
        theirs = BlipForImageTextRetrieval.from_pretrained(Path(folder) / "hf", local_files_only=True)
    return theirs.to(model.temp.device).eval()


def transformers_scores(
    theirs: nn.Module, model: BLIP_Retrieval, tokens: Tensor, text: TokenizedText, which: Tensor
) -> Tensor:
    """Matching logits (P,) of image tokens (P, n, V) and texts `which` (P,), padded to the longest of them."""
    ids, mask = (x[which] for x in text)
    longest = int(mask.sum(1).max())
    with model.autocast():
        states = theirs.text_encoder(
            input_ids=ids[:, :longest],
            attention_mask=mask[:, :longest],
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
        ).last_hidden_state[:, 0]
    return theirs.itm_head(states.float())[:, 1]


def query_by_query(score: Callable[[Tensor, Tensor], Tensor], num_images: int, num_texts: int, i2t: bool) -> Tensor:
    """Logits (queries, candidates): one call `score(images, texts)` for the pairs of each query."""
    image, text = torch.arange(num_images), torch.arange(num_texts)
    if i2t:
        return torch.stack([score(torch.full_like(text, i), text) for i in image])
    return torch.stack([score(image, torch.full_like(image, t)) for t in text])


class TextsOfOneImage(PlainTexts):
    """A rectangle of texts that all look at the one image: a single query sequence against its keys and values."""

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        return super().attend_image(q.flatten(0, 1)[None], k, v, heads, dropout).view_as(q)


def padded_scores(model: BLIP_Retrieval, tokens: Tensor, text: TokenizedText) -> Tensor:
    """Keys and values once for the one image (1, n, V); texts (P, 35) padded, everything of the last layer computed."""
    texts = TextsOfOneImage(text.attention_mask)
    with model.autocast():
        states = model.text_encoder(as_match_input(text), tokens, texts)[:, 0]
    return model.itm_head(states.float())[:, 1]


def unpadded_scores(model: BLIP_Retrieval, tokens: Tensor, text: TokenizedText, cls_only: bool) -> Tensor:
    """The same without padding and, with cls_only, [ENC] alone in the last layer; layer 0 in full for every pair."""
    lengths = text.attention_mask.sum(1).cpu().numpy()
    order = torch.from_numpy(np.argsort(lengths, kind="stable")).to(tokens.device)
    texts = ScoringTexts(np.zeros(len(lengths), int), np.sort(lengths), tokens.device)
    layers = model.text_encoder.encoder.layer
    with model.autocast():
        x = model.text_encoder.embeddings(as_match_input(text).input_ids[order])
        x = x[text.attention_mask[order].bool()]  # (T, D)
        for i, layer in enumerate(layers):
            x = layer.text_part(x, texts, cls_only and i == len(layers) - 1)
            x = layer.image_part(x, texts, tokens)
    states = x if cls_only else texts.first(x)
    logits = model.itm_head(states.float())[:, 1]
    return torch.empty_like(logits).index_copy_(0, order, logits)


def slow_ways(model: BLIP_Retrieval, tokens: Tensor, text: TokenizedText) -> dict[str, Callable[[], Tensor]]:
    """Both directions of the small gallery, tokens (B, n, V) and texts (C, 35): published loop and transformers."""
    theirs, ids = load_transformers(model), as_match_input(text)

    def published(image: Tensor, which: Tensor) -> Tensor:
        return pair_scores(model, tokens[image], ids, which)

    def transformers(image: Tensor, which: Tensor) -> Tensor:
        return transformers_scores(theirs, model, tokens[image], ids, which)

    size = len(tokens), len(text.input_ids)
    return {
        f"{score.__name__} {way}": lambda score=score, way=way: query_by_query(score, *size, way == "i2t")
        for score in (published, transformers)
        for way in ("i2t", "t2i")
    }


def restructurings(
    model: BLIP_Retrieval, images: EncodedImages, texts: EncodedTexts, text: TokenizedText, tokens_per_pass: int
) -> dict[str, Callable[[], Tensor]]:
    """One image with the texts (P, 35), each step with those before it."""
    tokens, distinct = images.tokens[0][:1].to(model.temp.device), texts.distinct[: len(text.input_ids)]

    def ours() -> Tensor:
        return torch.from_numpy(
            score_pairs(model, images, texts, np.zeros(len(distinct), int), distinct, tokens_per_pass)
        )

    steps = {
        "keys and values once": lambda: padded_scores(model, tokens, text),
        "no padding": lambda: unpadded_scores(model, tokens, text, cls_only=False),
        "[ENC] alone": lambda: unpadded_scores(model, tokens, text, cls_only=True),
        "layer 0 once": ours,
    }
    assert tuple(steps) == STEPS
    return steps
