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

from checkpoints.load import load_pretrained
from checkpoints.weights import merge_lora
from configs.schema import TEMP_RANGE, RetrievalConfig
from configs.sizes import MedConfig, load_med_config
from models import itc, itm
from models.arrangements import WholeArrangement
from models.med import BertModel
from models.vit import VisionTransformer
from transform.text import ENC, CaptionTokenizer, TokenizedText, blip_tokenizer
from utils import all_gather, all_gather_with_gradient, find_path


class BLIP_Retrieval(nn.Module):
    """The retrieval model of BLIP.

    `med_config` is a JSON file's path or a MedConfig; its `encoder_width` follows the ViT. `negative_all_rank` decides
    whether hard negatives come from all ranks (COCO) or only from the sample's own rank (Flickr30k). `tokenizer`: what
    the word embeddings mean; None is BLIP's.
    """

    image_queue: Tensor  # (E, Q)
    text_queue: Tensor  # (E, Q)
    idx_queue: Tensor  # (1, Q)
    ptr_queue: Tensor  # (1,) the slot to be written next

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
        vit_init_std: float = 0.02,
        tokenizer: CaptionTokenizer | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer or blip_tokenizer()
        med = med_config if isinstance(med_config, MedConfig) else load_med_config(med_config)

        def build_vit() -> VisionTransformer:
            checkpointing = vit_grad_ckpt, vit_ckpt_layer
            return VisionTransformer(vit, image_size, patch_size, *checkpointing, pos_embed_std, vit_init_std)

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
        self.register_buffer("idx_queue", torch.full((1, queue_size), itc.EMPTY))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))
        self.temp = nn.Parameter(0.07 * torch.ones([]))

        self.vit, self.image_size, self.queue_size, self.momentum, self.negative_all_rank = (
            vit, image_size, queue_size, momentum, negative_all_rank,
        )  # fmt: skip
        self.autocast_dtype: torch.dtype | None = None  # bfloat16 under `precision: bf16`

    def forward(
        self, image: Tensor, caption: Sequence[str] | TokenizedText, alpha: float, idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The published training step: image (b, 3, S, S), caption b strings or token ids, idx (b,) image ids.

        Returns (loss_ita, loss_itm) of this process, to be averaged over processes. It clamps the temperature, moves
        the momentum twins and writes the queues, so call it once a step. `training.step.train_step` computes the same
        in micro-batches. ValueError when a sample has no negative: all it may draw have its own image id.
        """
        text = caption if isinstance(caption, TokenizedText) else self.tokenizer.tokenize(caption)
        text = text.padded(self.tokenizer.max_tokens).to(image.device)  # (b, 35), so that processes can exchange them
        b = len(image)

        # 1. Features of both encoders, then of their momentum twins, which move towards them first.
        self.clamp_temp()
        image_tokens = self.encode_image(image)  # (b, N, V)
        image_feat = self.image_feature(image_tokens)  # (b, E)
        text_feat = self.text_feature(self.encode_text(text))  # (b, E)
        self.update_momentum()
        image_feat_m, text_feat_m = self.momentum_features(image, text)  # (b, E), (b, E)

        # 2. Contrast (ITC) with the momentum features of this batch, and with the queue before this batch enters it.
        image_all = torch.cat([image_feat_m.T, self.image_queue], dim=1)  # (E, b + Q)
        text_all = torch.cat([text_feat_m.T, self.text_queue], dim=1)  # (E, b + Q)
        same = itc.positives(idx, idx.expand(b, b), self.idx_queue)  # (b, b + Q)
        loss_i2t = itc.contrastive_loss(image_feat @ text_all, image_feat_m @ text_all, same, self.temp, alpha).mean()
        loss_t2i = itc.contrastive_loss(text_feat @ image_all, text_feat_m @ image_all, same, self.temp, alpha).mean()
        self.enqueue(all_gather(image_feat_m), all_gather(text_feat_m), all_gather(idx))

        # 3. Hard negatives: each text draws an image, then each image a text; the more similar, the likelier.
        gather, gather_tokens = _own, _own  # among the c = b samples of this rank ...
        if self.negative_all_rank:
            gather, gather_tokens = all_gather, all_gather_with_gradient  # ... or among those of all ranks
        all_idx = gather(idx)  # (c,)
        drawn_image, found_image = itm.sample_negatives(text_feat, gather(image_feat), idx, all_idx, self.temp)  # (b,)
        drawn_text, found_text = itm.sample_negatives(image_feat, gather(text_feat), idx, all_idx, self.temp)  # (b,)
        if not (found_image & found_text).all():
            raise ValueError(itm.NO_NEGATIVE)

        # 4. Matching (ITM): each sample's own pair, its text with the drawn image, the drawn text with its image.
        all_tokens = gather_tokens(image_tokens)  # (c, N, V)
        drawn = TokenizedText(*(gather(x)[drawn_text] for x in text))  # (b, 35)
        texts = TokenizedText(*(torch.cat([x, x, y]) for x, y in zip(text, drawn, strict=True)))  # (3b, 35)
        images = torch.cat([image_tokens, all_tokens[drawn_image], image_tokens])  # (3b, N, V)
        label = (torch.arange(3 * b, device=image.device) < b).long()  # (3b,) 1 = match
        loss_itm = itm.matching_loss(self.match(texts, images), label).mean()
        return (loss_i2t + loss_t2i) / 2, loss_itm

    # ---- encoders -------------------------------------------------------------------------------------------------

    def autocast(self):
        """The context the encoders compute in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.temp.device.type, dtype=self.autocast_dtype)

    def encode_image(self, image: Tensor, cls_only: bool = False) -> Tensor:
        """(b, 3, S, S), or what `image_stem` made of them -> image tokens (b, N, V), or (b, 1, V) with cls_only."""
        with self.autocast():
            return _run_vit(self.visual_encoder, image, cls_only)

    @torch.no_grad()
    def image_stem(self, image: Tensor) -> Tensor:
        """(b, 3, S, S) -> (b, N, V) by the frozen stem, which the momentum twin has too."""
        with self.autocast():
            return self.visual_encoder.stem(image)

    def encode_text(self, text: TokenizedText, arrangement: WholeArrangement | None = None) -> Tensor:
        """ids (b, L) -> [CLS] state (b, 1, D), without an image."""
        with self.autocast():
            return self.text_encoder(text, arrangement=arrangement, cls_only=True)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """(b, N, V) -> unit-length embedding of [CLS] (b, E), float32 or wider."""
        return unit_feature(self.vision_proj, image_tokens)

    def text_feature(self, text_states: Tensor) -> Tensor:
        """(b, L, D) -> unit-length embedding of [CLS] (b, E), float32 or wider."""
        return unit_feature(self.text_proj, text_states)

    def match(self, text: TokenizedText, image_tokens: Tensor, arrangement: WholeArrangement | None = None) -> Tensor:
        """Matching logits (P, 2), [:, 1] = match, of texts (P, L) and images (P, N, V).

        Under an arrangement that knows which text looks at which image, each image comes once: (m, N, V).
        """
        text = as_match_input(text, self.tokenizer.enc)
        with self.autocast():
            states = self.text_encoder(text, image_tokens, arrangement, cls_only=True)  # (P, 1, D)
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
            twin.load_state_dict(merge_lora(online.state_dict()))
            twin.requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self) -> None:
        """twin <- momentum * twin + (1 - momentum) * online, for all parameters in a few kernels."""
        online: list[Tensor] = []
        twin: list[Tensor] = []
        for module, module_m in self.twins():
            for name, parameter in module_m.named_parameters():
                owner, _, attribute = name.rpartition(".")
                followed = getattr(module.get_submodule(owner), attribute)  # with low-rank updates, their sum
                if followed is not parameter:  # frozen ones are shared
                    online.append(followed)
                    twin.append(parameter)
        torch._foreach_lerp_(twin, online, 1 - self.momentum)

    @torch.no_grad()
    def momentum_features(
        self, image: Tensor, text: TokenizedText, arrangement: WholeArrangement | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (b, E), (b, E) by the twins. They stay in train mode (dropout, drop-path), as BLIP's do."""
        with self.autocast():
            image_tokens = _run_vit(self.visual_encoder_m, image, cls_only=True)
            text_states = self.text_encoder_m(text, arrangement=arrangement, cls_only=True)
        return unit_feature(self.vision_proj_m, image_tokens), unit_feature(self.text_proj_m, text_states)

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


def as_match_input(text: TokenizedText, enc: int = ENC) -> TokenizedText:
    """The same texts with [ENC] in place of [CLS], which tells the encoder to look at an image."""
    ids = text.input_ids.clone()
    ids[:, 0] = enc
    return TokenizedText(ids, text.attention_mask)


def _run_vit(encoder: VisionTransformer, image: Tensor, cls_only: bool) -> Tensor:
    """Pixels (b, 3, S, S) from the start, stem states (b, N, V) from there on."""
    return encoder(image, cls_only) if image.dim() == 4 else encoder.upper(image, cls_only)


def unit_feature(proj: nn.Linear, states: Tensor) -> Tensor:
    """First of states (b, n, V or D), projected in the precision of `proj`, of unit length: (b, E)."""
    return F.normalize(proj(states[:, 0].to(proj.weight.dtype)), dim=-1)


def _own(x: Tensor) -> Tensor:
    """Stands in for all_gather where only this rank's samples may be drawn."""
    return x


def blip_retrieval(pretrained: str = "", **kwargs) -> BLIP_Retrieval:
    """Build the model and, when `pretrained` names a file or an address, load it."""
    model = BLIP_Retrieval(**kwargs)
    if pretrained:
        load_pretrained(model, pretrained)
    return model


def build_model(
    cfg: RetrievalConfig, med: MedConfig | None = None, tokenizer: CaptionTokenizer | None = None
) -> BLIP_Retrieval:
    """The model that a config describes, with random weights; `med` and `tokenizer` are those of its plan, if any."""
    names = ("image_size", "vit", "vit_grad_ckpt", "vit_ckpt_layer", "embed_dim", "queue_size", "momentum",
             "negative_all_rank", "patch_size", "pos_embed_std", "vit_init_std")  # fmt: skip
    med_config = med or find_path(cfg.med_config)
    return BLIP_Retrieval(med_config=med_config, tokenizer=tokenizer, **{name: getattr(cfg, name) for name in names})
