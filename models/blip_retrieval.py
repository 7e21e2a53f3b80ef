"""BLIP for image-text retrieval: two encoders, a matching head, momentum twins and feature queues.

Sources: Li et al. 2022 (BLIP, arXiv 2201.12086), Li et al. 2021 (ALBEF, arXiv 2107.07651), He et al. 2020 (MoCo,
arXiv 1911.05722). State-dict names are those of the published checkpoints.

Shapes: b images or texts, S pixels a side, N image tokens, V image width, L text tokens, D text width,
P image-text pairs, E embedding width, Q queue size.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.itc import EMPTY, TEMP_RANGE
from models.med import BertModel, MedConfig, PairRows, load_med_config
from models.ragged import RaggedTexts
from models.train_step import RetrievalStep
from models.vit import VisionTransformer
from transform.text import ENC, TokenizedText, tokenize


class BLIP_Retrieval(nn.Module):
    """The retrieval model of BLIP.

    `med_config` is a JSON file's path or a MedConfig; its `encoder_width` follows the ViT. `negative_all_rank` decides
    whether hard negatives come from all ranks (COCO) or from the sample's own (Flickr30k).
    """

    def __init__(
        self,
        med_config: str | Path | MedConfig = "configs/med_config.json",
        image_size: int = 384,
        vit: str = "base",
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        embed_dim: int = 256,
        queue_size: int = 57600,
        momentum: float = 0.995,
        negative_all_rank: bool = False,
        patch_size: int = 16,
        pos_embed_std: float = 0.02,
    ):
        super().__init__()
        med = med_config if isinstance(med_config, MedConfig) else load_med_config(med_config)

        def build_vit() -> VisionTransformer:
            return VisionTransformer(vit, image_size, patch_size, vit_grad_ckpt, vit_ckpt_layer, pos_embed_std)

        self.visual_encoder = build_vit()
        vision_width = self.visual_encoder.width
        med = replace(med, encoder_width=vision_width)
        text_width = med.hidden_size
        self.text_encoder = BertModel(med)
        self.vision_proj = nn.Linear(vision_width, embed_dim)
        self.text_proj = nn.Linear(text_width, embed_dim)
        self.itm_head = nn.Linear(text_width, 2)

        # The twins are constructed, not deep-copied: see VisionTransformer.
        self.visual_encoder_m = build_vit()
        self.vision_proj_m = nn.Linear(vision_width, embed_dim)
        self.text_encoder_m = BertModel(med)
        self.text_proj_m = nn.Linear(text_width, embed_dim)
        self.copy_params()

        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), EMPTY))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))
        self.temp = nn.Parameter(0.07 * torch.ones([]))

        self.queue_size, self.momentum, self.negative_all_rank = queue_size, momentum, negative_all_rank
        self.autocast_dtype: torch.dtype | None = None  # bfloat16 under `precision: bf16`

    def forward(
        self, image: Tensor, caption: Sequence[str] | TokenizedText, alpha: float, idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One training forward on a batch: image (b, 3, S, S), caption b strings or token ids, idx (b,) image ids.

        Returns (loss_ita, loss_itm) of this process. Clamps the temperature, moves the momentum twins and writes the
        queues, so call it once a step. `models.train_step.train_step` computes the same in micro-batches.
        """
        text = caption if isinstance(caption, TokenizedText) else tokenize(caption)
        step = RetrievalStep(self, image, text, idx, alpha, snapshot_queues=True)
        everything = slice(0, len(image))
        loss_t2i = step.text_loss(everything)
        image_tokens = step.encode_image(everything)
        step.draw_negatives(everything)
        loss_i2t, loss_itm = step.image_loss(everything, image_tokens)
        step.write_queues()
        return loss_i2t + loss_t2i, loss_itm

    # ---- encoders -------------------------------------------------------------------------------------------------

    def autocast(self):
        """The context the encoders compute in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.temp.device.type, dtype=self.autocast_dtype)

    def encode_image(self, image: Tensor, cls_only: bool = False) -> Tensor:
        """(b, 3, S, S) -> image tokens (b, N, V), or (b, 1, V) with cls_only."""
        with self.autocast():
            return self.visual_encoder(image, cls_only)

    def encode_text(self, text: TokenizedText, rows: RaggedTexts | None = None) -> Tensor:
        """ids (b, L) -> [CLS] state (b, 1, D), without an image."""
        with self.autocast():
            return self.text_encoder(text, rows=rows, cls_only=True)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """(b, N, V) -> unit-length embedding of [CLS] (b, E), float32 or wider."""
        return _feature(self.vision_proj, image_tokens)

    def text_feature(self, text_states: Tensor) -> Tensor:
        """(b, L, D) -> unit-length embedding of [CLS] (b, E), float32 or wider."""
        return _feature(self.text_proj, text_states)

    def match(
        self, text: TokenizedText, image_tokens: Tensor, rows: PairRows | RaggedTexts | None = None
    ) -> Tensor:
        """Matching logits (P, 2), [:, 1] = match, of texts (P, L) and images (m, N, V); `rows`: which meets which."""
        text = as_match_input(text)
        with self.autocast():
            states = self.text_encoder(text, image_tokens, rows, cls_only=True)  # (P, 1, D)
        return self.itm_head(states[:, 0].to(self.itm_head.weight.dtype))

    # ---- momentum twins and queues --------------------------------------------------------------------------------

    def twins(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(online, momentum) module pairs."""
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            yield getattr(self, name), getattr(self, f"{name}_m")

    @torch.no_grad()
    def copy_params(self) -> None:
        """Start the twins at the online weights; they never get gradients."""
        for online, twin in self.twins():
            twin.load_state_dict(online.state_dict())
            twin.requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self) -> None:
        """twin <- momentum * twin + (1 - momentum) * online, for all parameters in a few kernels."""
        online = [p for module, _ in self.twins() for p in module.parameters()]
        twin = [p for _, module in self.twins() for p in module.parameters()]
        torch._foreach_lerp_(twin, online, 1 - self.momentum)

    @torch.no_grad()
    def momentum_features(
        self, image: Tensor, text: TokenizedText, rows: RaggedTexts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (b, E), (b, E) by the twins. They stay in train mode (dropout, drop-path), as BLIP's do."""
        with self.autocast():
            image_tokens = self.visual_encoder_m(image, cls_only=True)
            text_states = self.text_encoder_m(text, rows=rows, cls_only=True)
        return _feature(self.vision_proj_m, image_tokens), _feature(self.text_proj_m, text_states)

    @torch.no_grad()
    def clamp_temp(self) -> None:
        self.temp.clamp_(*TEMP_RANGE)

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> None:
        """Overwrite the oldest slots with all ranks' momentum features (n, E), (n, E) and ids (n,); wraps around."""
        slots = (self.ptr_queue + torch.arange(len(idx), device=idx.device)) % self.queue_size
        self.image_queue[:, slots] = image_feat.T.to(self.image_queue.dtype)
        self.text_queue[:, slots] = text_feat.T.to(self.text_queue.dtype)
        self.idx_queue[0, slots] = idx
        self.ptr_queue.add_(len(idx)).remainder_(self.queue_size)


def as_match_input(text: TokenizedText) -> TokenizedText:
    """The same texts with [ENC] in place of [CLS], which tells the encoder to look at an image."""
    ids = text.input_ids.clone()
    ids[:, 0] = ENC
    return TokenizedText(ids, text.attention_mask)


def _feature(proj: nn.Linear, states: Tensor) -> Tensor:
    return F.normalize(proj(states[:, 0].to(proj.weight.dtype)), dim=-1)


def blip_retrieval(pretrained: str = "", **kwargs) -> BLIP_Retrieval:
    """Build the model and, when `pretrained` names a file or an address, load it."""
    model = BLIP_Retrieval(**kwargs)
    if pretrained:
        from models.checkpoint import load_pretrained

        load_pretrained(model, pretrained)
    return model
