"""BERT text encoder with cross-attention to image tokens (BLIP's mixture of encoder-decoder, encoder half).

Sources: Devlin et al. 2019 (arXiv 1810.04805), Li et al. 2022 (arXiv 2201.12086, section 3.1). Parameter names are the
published checkpoints'. The tests hold it against transformers' `BlipTextModel`.

One layer serves three arrangements of tokens, which only know how queries meet keys: `PaddedTexts` (a rectangle with a
mask, the plain one), `models/ragged.py`'s `RaggedTexts` (training) and `models/packed.py`'s `PackedTexts` (evaluation).

Shapes: P texts (one for each image-text pair when matching), L tokens, D hidden width, H heads, d = D / H,
m images, N image tokens, V image width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.ragged import RaggedTexts
from transform.text import TokenizedText


@dataclass(frozen=True)
class MedConfig:
    """The text encoder's sizes, as in BLIP's `med_config.json`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    encoder_width: int = 768  # V; the model sets it to its ViT's width


# What a BERT config may also say, without meaning for this encoder.
_IGNORED = {
    "architectures", "model_type", "type_vocab_size", "pad_token_id", "add_cross_attention", "hidden_act",
}  # fmt: skip


def load_med_config(path: str | Path) -> MedConfig:
    """Read a text encoder's JSON; a key that this encoder cannot honour is a ValueError naming it."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"med_config: there is no file {path}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"med_config: {path} is not valid JSON ({error}).") from None
    unknown = set(values) - set(MedConfig.__dataclass_fields__) - _IGNORED
    if unknown:
        raise ValueError(
            f"{path}: unknown text-encoder key(s) {sorted(unknown)}; known: {sorted(MedConfig.__dataclass_fields__)}."
        )
    if values.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act is {values['hidden_act']!r}; this encoder computes 'gelu' only.")
    config = MedConfig(**{key: value for key, value in values.items() if key not in _IGNORED})
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}."
        )
    return config


class PairRows:
    """Which image each pair's text looks at, so that an image's keys and values serve all of its texts.

    `image_of_pair`: P host integers in [0, m). Pairs of one image take slots 0, 1, ... beside each other.
    """

    def __init__(self, image_of_pair: list[int], num_images: int, device: torch.device):
        filled = [0] * num_images
        slots = []
        for image in image_of_pair:
            slots.append(filled[image])
            filled[image] += 1
        self.num_slots = max(filled)
        self.index = torch.tensor([image_of_pair, slots], device=device)  # (2, P)
        self.identity = image_of_pair == list(range(num_images))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q (P, H, L, d), k and v (m, H, N, d) -> (P, H, L, d): all texts of an image are one long query."""
        if self.identity:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        image, slot = self.index
        (_, heads, length, width), m = q.shape, len(k)
        grid = q.new_zeros(m, self.num_slots, heads, length, width).index_put((image, slot), q)
        grid = grid.transpose(1, 2).flatten(2, 3)  # (m, H, slots * L, d)
        context = F.scaled_dot_product_attention(grid, k, v, dropout_p=dropout)
        return context.unflatten(2, (self.num_slots, length)).transpose(1, 2)[image, slot]


class PaddedTexts:
    """Tokens as a (P, L) rectangle; padding is masked, and absent where all texts have the same length."""

    def __init__(self, attention_mask: Tensor, rows: PairRows | None = None, padded: bool = True):
        self.mask = attention_mask.bool()[:, None, None, :] if padded else None  # (P, 1, 1, L)
        self.rows = rows

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return x[:, :1]  # (P, 1, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout))

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        return merge_heads(self.rows.attend(q, k, v, dropout))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (P, L, D) -> (P, H, L, d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (P, H, L, d) -> (P, L, D)


class AttentionProjections(nn.Module):
    """`self` of a checkpoint's attention: query, key, value."""

    def __init__(self, hidden: int, kv_width: int):
        super().__init__()
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(kv_width, hidden)
        self.value = nn.Linear(kv_width, hidden)


class ResidualOutput(nn.Module):
    """`output` of a checkpoint's attention or MLP: dense, dropout, add, normalise (post-norm)."""

    def __init__(self, width: int, config: MedConfig):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Multi-head attention of `x` to `source`; `attend(q, k, v, heads, dropout)` comes from the arrangement."""

    def __init__(self, config: MedConfig, kv_width: int):
        super().__init__()
        self.heads, self.drop = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = AttentionProjections(config.hidden_size, kv_width)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, x: Tensor, source: Tensor, attend) -> Tensor:
        proj = self.self
        dropout = self.drop if self.training else 0.0
        context = attend(proj.query(x), proj.key(source), proj.value(source), self.heads, dropout)
        return self.output(context, x)


class Intermediate(nn.Module):
    """`intermediate` of a checkpoint's layer."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention (only when there are image tokens), MLP."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_width)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def text_part(self, x: Tensor, texts, cls_only: bool = False) -> Tensor:
        """Self-attention; with cls_only of the first token alone (keys and values of all)."""
        return self.attention(texts.first(x) if cls_only else x, x, texts.attend_text)

    def image_part(self, x: Tensor, texts, image_tokens: Tensor | None) -> Tensor:
        """Cross-attention and MLP. An image's keys and values are computed once, whatever its number of texts."""
        if image_tokens is not None:
            x = self.crossattention(x, image_tokens, texts.attend_image)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    """Word plus position embeddings (BLIP's BERT has no token types)."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        position = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + position))


class Encoder(nn.Module):
    """`encoder` of a checkpoint: the stack of layers."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertModel(nn.Module):
    """The text encoder; without image tokens it is BERT, with them every layer looks at the image too."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(self._init_weights)

    def forward(
        self,
        text: TokenizedText,
        image_tokens: Tensor | None = None,
        rows: PairRows | RaggedTexts | None = None,
        cls_only: bool = False,
        padded: bool = True,
    ) -> Tensor:
        """ids (P, L), image tokens (m, N, V) -> (P, L, D); with cls_only (P, 1, D), the last layer's rest not computed.

        `rows` says which image each text looks at (absent: text p at image p); RaggedTexts, with cls_only, takes the
        padding out. `padded=False` promises that the mask is all ones.
        """
        if image_tokens is not None and rows is None:
            rows = PairRows(list(range(len(image_tokens))), len(image_tokens), image_tokens.device)
        texts = rows if isinstance(rows, RaggedTexts) else PaddedTexts(text.attention_mask, rows, padded)
        x = texts.pack(self.embeddings(text.input_ids))
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            x = layer.text_part(x, texts, cls_only and i == last)
            x = layer.image_part(x, texts, image_tokens)
        return texts.unpack(x)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
