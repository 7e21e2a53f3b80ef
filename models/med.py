"""BERT text encoder with cross-attention to image tokens (BLIP's mixture of encoder-decoder, encoder half).

Sources: Devlin et al. 2019 (arXiv 1810.04805), Li et al. 2022 (arXiv 2201.12086, section 3.1). Parameter names are the
published checkpoints'. The tests hold it against transformers' `BlipTextModel`.

One layer serves every arrangement of tokens (`models/arrangements.py`), which alone knows how queries meet keys.

Shapes: P texts (one for each image-text pair when matching), L tokens, D hidden width, H heads, d = D / H,
m images, N image tokens, V image width.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sizes import MedConfig
from models.arrangements import Arrangement, PlainTexts, WholeArrangement
from transform.text import TokenizedText


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


class CastOnce:
    """Image tokens under autocast: cast, and kept for the backward pass, once instead of in every layer's two products.

    Same numbers: gradients of the uses still add up in the tokens' own precision.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype):
        self.x, self.low = x, x.detach().to(dtype)

    def use(self) -> Tensor:
        return _Use.apply(self.x, self.low) if torch.is_grad_enabled() else self.low


class _Use(torch.autograd.Function):
    """`low` on the way forward, a cast of `x` on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, low: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = x.dtype
        return low.view_as(low)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


class Attention(nn.Module):
    """Multi-head attention of `x` to `source`; `attend(q, k, v, heads, dropout)` comes from the arrangement."""

    def __init__(self, config: MedConfig, kv_width: int):
        super().__init__()
        self.heads, self.drop = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = AttentionProjections(config.hidden_size, kv_width)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, x: Tensor, source: "Tensor | CastOnce", attend: Callable[..., Tensor]) -> Tensor:
        proj = self.self
        dropout = self.drop if self.training else 0.0
        of_key, of_value = (source.use() if isinstance(source, CastOnce) else source for _ in range(2))
        context = attend(proj.query(x), proj.key(of_key), proj.value(of_value), self.heads, dropout)
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

    def text_part(self, x: Tensor, texts: Arrangement, cls_only: bool = False) -> Tensor:
        """Self-attention; with cls_only the first token of each text is the only query."""
        return self.attention(texts.first(x) if cls_only else x, x, texts.attend_text)

    def image_part(self, x: Tensor, texts: Arrangement, image_tokens: "Tensor | CastOnce | None") -> Tensor:
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
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.layer = cast("Sequence[BertLayer]", layers)


class BertModel(nn.Module):
    """The text encoder: BERT without image tokens; with them every layer looks at the image too."""

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
        arrangement: WholeArrangement | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """ids (P, L), image tokens (m, N, V) -> (P, L, D); with cls_only (P, 1, D), all the last layer computes.

        Without an arrangement texts are a rectangle with a mask, and text p looks at image p.
        """
        texts = arrangement or PlainTexts(text.attention_mask)
        x = texts.pack(self.embeddings(text.input_ids))
        last, device = len(self.encoder.layer) - 1, x.device.type
        seen: Tensor | CastOnce | None = image_tokens
        if image_tokens is not None and torch.is_autocast_enabled(device):
            seen = CastOnce(image_tokens, torch.get_autocast_dtype(device))
        for i, layer in enumerate(self.encoder.layer):
            x = layer.text_part(x, texts, cls_only and i == last)
            x = layer.image_part(x, texts, seen)
        return texts.unpack(x)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
