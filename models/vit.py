"""Vision transformer with BLIP's parameter names, on timm's Block and PatchEmbed.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); BLIP's `models/vit.py` for names and drop-path rates.

Shapes: b images, S pixels a side, N = 1 + (S / patch)^2 tokens ([CLS] first), V width.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sizes import VIT_SIZES


class VitBlock(Block):
    """timm's pre-norm block, computed in the autocast precision it is handed.

    fairscale's checkpoint_wrapper recomputes under float16 whatever the forward ran in; with the precision as an
    argument the recomputation repeats the forward exactly. (timm's other arguments, masks, have no use here.)
    """

    attn: Attention

    def forward(self, x: Tensor, autocast_dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return super().forward(x)

    def forward_cls(self, x: Tensor) -> Tensor:
        """The block's output at [CLS] alone, (b, N, V) -> (b, 1, V): keys and values of all tokens, one query."""
        attn = self.attn
        normed = self.norm1(x)
        qkv = F.linear(normed, attn.qkv.weight, attn.qkv.bias)  # (b, N, 3 V)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).unbind(2)  # (b, N, heads, V / heads) each
        q, k, v = q[:, :1].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, 1 or N, V / heads)
        context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (b, 1, V)
        x = x[:, :1] + self.drop_path1(attn.proj(context))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Image encoder; the last `vit_ckpt_layer` blocks are recomputed in the backward pass when `vit_grad_ckpt`.

    fairscale's wrapper must not be deep-copied: the copy keeps running the original's weights. Momentum twins are
    therefore built by this constructor.
    """

    def __init__(
        self,
        vit: str,
        image_size: int,
        patch_size: int = 16,
        grad_ckpt: bool = False,
        ckpt_layer: int = 0,
        pos_embed_std: float = 0.02,
    ):
        super().__init__()
        width, depth, heads, drop_path = VIT_SIZES[vit]
        self.width, self.stochastic = width, drop_path > 0
        self.patch_embed = PatchEmbed(img_size=image_size, patch_size=patch_size, embed_dim=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        blocks = [
            VitBlock(width, heads, qkv_bias=True, drop_path=rate, norm_layer=norm)  # type: ignore[arg-type]  # partial
            for rate in rates
        ]
        self.blocks = cast("Sequence[VitBlock]", nn.ModuleList(blocks))
        self.norm = norm(width)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=pos_embed_std)
        for block in self.blocks[depth - ckpt_layer :] if grad_ckpt else ():
            checkpoint_wrapper(block)  # patches the block's forward in place; names stay

    def forward(self, image: Tensor, cls_only: bool = False) -> Tensor:
        """(b, 3, S, S) -> (b, N, V); with cls_only (b, 1, V): the last block computes nothing else."""
        x = self.patch_embed(image)  # (b, N - 1, V)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # (b, N, V)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for block in self.blocks[:-1]:
            x = block(x, autocast_dtype=dtype)
        last = self.blocks[-1]
        return self.norm(last.forward_cls(x) if cls_only else last(x, autocast_dtype=dtype))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
