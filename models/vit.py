"""Vision transformer with BLIP's parameter names, on timm's Block and PatchEmbed.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); BLIP's `models/vit.py` for names and drop-path rates.

Shapes: b images, S pixels a side, N = 1 + (S / patch)^2 tokens ([CLS] first), V width.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from timm.layers import DropPath, PatchEmbed, get_act_layer
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sizes import VIT_SIZES
from models.attention import training_attention

# fairscale names autocast as torch did before 2.4, in every backward pass. The blocks below set their own precision.
warnings.filterwarnings(
    "ignore", r".torch\.cuda\.amp\.autocast\(", FutureWarning, r"fairscale\.nn\.checkpoint\.checkpoint_activations"
)
# Said of a recomputed block behind frozen ones. Its input needs no gradient, but its weights do, and get theirs.
warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True", UserWarning)


class VitBlock(Block):
    """timm's pre-norm block, computed in the autocast precision it is handed.

    fairscale's checkpoint_wrapper recomputes under float16 whatever the forward ran in; with the precision as an
    argument the recomputation repeats the forward exactly. (timm's other arguments, masks, have no use here.)
    """

    attn: Attention

    @property
    def stochastic(self) -> bool:
        """Whether training drops the block now and then."""
        return isinstance(self.drop_path1, DropPath)

    def forward(self, x: Tensor, autocast_dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return self._run(x, x.shape[1])

    def forward_cls(self, x: Tensor) -> Tensor:
        """The block's output at [CLS] alone, (b, N, V) -> (b, 1, V): keys and values of all tokens, one query."""
        return self._run(x, 1)

    def _run(self, x: Tensor, tokens: int) -> Tensor:
        """(b, N, V) -> (b, tokens, V): the block's output at the first tokens."""
        attend = training_attention if self.training else F.scaled_dot_product_attention
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.attn.num_heads, -1)).unbind(2)  # (b, N, heads, d)
        q, k, v = q[:, :tokens].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, tokens or N, d)
        context = attend(q, k, v).transpose(1, 2).flatten(2)  # (b, tokens, V)
        x = x[:, :tokens] + self.drop_path1(self.attn.proj(context))
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
        init_std: float = 0.02,
    ):
        super().__init__()
        size = VIT_SIZES[vit]
        width, depth = size.width, size.depth
        self.width, self.stochastic = width, size.drop_path > 0
        self.stem_depth, self.stem_frozen = 0, False  # `models/freezing.py`
        self.patch_embed = PatchEmbed(img_size=image_size, patch_size=patch_size, embed_dim=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        norm, act = partial(nn.LayerNorm, eps=size.norm_eps), get_act_layer(size.activation)
        rates = [size.drop_path * i / (depth - 1) for i in range(depth)]
        blocks = [
            VitBlock(width, size.heads, qkv_bias=True, drop_path=rate, norm_layer=norm, act_layer=act)  # type: ignore[arg-type]  # partial
            for rate in rates
        ]
        self.norm_pre = norm(width) if size.norm_pre else nn.Identity()
        self.blocks = cast("Sequence[VitBlock]", nn.ModuleList(blocks))
        self.norm = norm(width)
        self.apply(partial(_init_weights, std=init_std))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=pos_embed_std)
        for block in self.blocks[depth - ckpt_layer :] if grad_ckpt else ():
            checkpoint_wrapper(block)  # patches the block's forward in place; names stay

    def forward(self, image: Tensor, cls_only: bool = False) -> Tensor:
        """(b, 3, S, S) -> (b, N, V); with cls_only (b, 1, V): the last block computes nothing else."""
        return self.upper(self.stem(image), cls_only)

    def stem(self, image: Tensor) -> Tensor:
        """(b, 3, S, S) -> (b, N, V): embeddings and the lowest `stem_depth` blocks, which are frozen."""
        x = self.patch_embed(image)  # (b, N - 1, V)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # (b, N, V)
        return self._run(self.blocks[: self.stem_depth], self.norm_pre(x))

    def upper(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """What `stem` gives (b, N, V) -> (b, N, V); with cls_only (b, 1, V)."""
        blocks = self.blocks[self.stem_depth :]
        if not (cls_only and blocks):
            return self.norm(self._run(blocks, x[:, :1] if cls_only else x))
        return self.norm(blocks[-1].forward_cls(self._run(blocks[:-1], x)))

    def _run(self, blocks: Sequence[VitBlock], x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for block in blocks:
            x = block(x, autocast_dtype=dtype)
        return x


def _init_weights(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
