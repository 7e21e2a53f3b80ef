"""The model as three graphs, image, text and match, for programs without this repository.

`checkpoints/graphs.py` writes them as ONNX or for torch.export: one set of modules for both. Inputs and outputs are
float32 and int64 whatever the precision inside, so that one program serves all of them. [ENC] is put first inside
`match`. Batch and text length are free; resizing and tokenising stay outside.

Shapes: b images or texts, S pixels a side, N image tokens, V image width, L text tokens, E embedding width, P pairs.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from checkpoints.graphs import Part, preparation, write_graphs
from checkpoints.weights import weights_sha256
from models.blip_retrieval import BLIP_Retrieval, as_match_input, unit_feature
from models.loading import Blip
from transform.text import TokenizedText

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoder(nn.Module):
    """A copy of an encoder with weights in `dtype`; it computes in `dtype`, or else in float32 (`stored_only`)."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype, stored_only: bool):
        super().__init__()
        self.encoder, self.stored_only = encoder.to(dtype), stored_only
        self.dtype = torch.float32 if stored_only else dtype

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        inputs = tuple(x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        if not self.stored_only:
            return self.encoder(*inputs, **options).float()
        weights = {name: value.float() for name, value in self.encoder.named_parameters()}
        return functional_call(self.encoder, weights, inputs, options)


class ImagePart(Part):
    """image (b, 3, S, S) -> tokens (b, N, V), feature (b, E)."""

    name, inputs, outputs = "image", {"image": ("batch",)}, ("tokens", "feature")

    def __init__(self, model: BLIP_Retrieval, dtype: torch.dtype, stored_only: bool):
        super().__init__()
        self.visual_encoder = Encoder(copy.deepcopy(model.visual_encoder), dtype, stored_only)
        self.vision_proj = model.vision_proj
        self.size = model.image_size

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.visual_encoder(image)
        return tokens, unit_feature(self.vision_proj, tokens)

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, self.size, self.size),)

    @staticmethod
    def expected(model: BLIP_Retrieval, *inputs: Tensor) -> tuple[Tensor, ...]:
        (image,) = inputs
        tokens = model.encode_image(image)
        return tokens, model.image_feature(tokens)


class TextPart(Part):
    """ids (b, L), mask (b, L) -> feature (b, E)."""

    name, inputs, outputs = "text", {"ids": ("batch", "length"), "mask": ("batch", "length")}, ("feature",)

    def __init__(self, model: BLIP_Retrieval, dtype: torch.dtype, stored_only: bool):
        super().__init__()
        encoder = copy.deepcopy(model.text_encoder)
        for layer in encoder.encoder.layer:
            del layer.crossattention
        self.text_encoder, self.text_proj = Encoder(encoder, dtype, stored_only), model.text_proj
        self.vocab_size, self.tokenizer = model.text_encoder.config.vocab_size, model.tokenizer
        self.longest = model.text_encoder.config.max_position_embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        states = self.text_encoder(TokenizedText(ids, mask), cls_only=True)
        return (unit_feature(self.text_proj, states),)

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        return random_texts(batch, length, self.vocab_size, self.tokenizer.cls)

    @staticmethod
    def expected(model: BLIP_Retrieval, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (model.text_feature(model.encode_text(TokenizedText(*inputs))),)


class MatchPart(Part):
    """ids (P, L), mask (P, L), tokens (P, N, V) -> logits (P, 2), [:, 1] = match; text p with image p."""

    name, outputs = "match", ("logits",)
    inputs = {**TextPart.inputs, "tokens": ("batch",)}

    def __init__(self, model: BLIP_Retrieval, dtype: torch.dtype, stored_only: bool):
        super().__init__()
        self.text_encoder = Encoder(copy.deepcopy(model.text_encoder), dtype, stored_only)
        self.itm_head = model.itm_head
        self.vocab_size, self.tokenizer = model.text_encoder.config.vocab_size, model.tokenizer
        self.longest = model.text_encoder.config.max_position_embeddings
        self.tokens = model.visual_encoder.pos_embed.shape[1:]

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor]:
        text = as_match_input(TokenizedText(ids, mask), self.tokenizer.enc)
        return (self.itm_head(self.text_encoder(text, tokens, cls_only=True)[:, 0]),)

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        return *random_texts(batch, length, self.vocab_size, self.tokenizer.cls), torch.randn(batch, *self.tokens)

    @staticmethod
    def expected(model: BLIP_Retrieval, *inputs: Tensor) -> tuple[Tensor, ...]:
        ids, mask, tokens = inputs
        return (model.match(TokenizedText(ids, mask), tokens),)


def random_texts(batch: int, length: int, vocab_size: int, cls: int) -> tuple[Tensor, Tensor]:
    """ids and mask (batch, length): texts of 2 to `length` tokens, the first of them full."""
    lengths = torch.randint(2, length + 1, (batch, 1))
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(vocab_size, (batch, length)) * mask
    ids[:, 0] = cls
    return ids, mask


def export(
    blip: Blip, kind: str, folder: Path, precision: str, threshold: float | None, checkpoint: str, card: str
) -> list[str]:
    """Write the three graphs and what belongs to them to a new folder; lines about their sizes and differences.

    `kind`: onnx or export2. `precision` of the encoders' weights and products: fp32, fp16 or bf16; onnxruntime has no
    products in bf16 on a CPU, so that under ONNX bf16 is of the weights alone. Heads are always float32. `card`: the
    folder's README.md.
    """
    model, dtype = blip.model, DTYPES[precision]
    stored_only = kind == "onnx" and dtype == torch.bfloat16
    parts = [partial(part, model, dtype, stored_only) for part in (ImagePart, TextPart, MatchPart)]
    source = {"checkpoint": Path(checkpoint).name, "weights_sha256": weights_sha256(model), "precision": precision}
    preprocess = preparation(model.image_size, blip.rule, blip.colours, model.tokenizer, threshold, source)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return write_graphs(folder, kind, parts, model, preprocess, model.tokenizer, card, precision == "fp32")
