"""Low-rank updates: W + alpha / rank * B A is trained instead of W.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685). It is a parametrisation of the weight itself, so that whatever reads
the weight sees the sum: every arrangement, [CLS] alone, and the momentum twins, which follow the sum and have no A and
B of their own. Files in the published layout hold the sum; saves for `--resume` hold W, A and B.

Shapes: W (o, i), A (r, i), B (o, r).
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.blip_retrieval import BLIP_Retrieval

BLOCK, LAYER = r"visual_encoder\.blocks\.\d+\.", r"text_encoder\.encoder\.layer\.\d+\."
# The keys of `lora`'s targets, as in configs/schema.py, and the modules that they mean.
TARGETS = {
    "image.qkv": BLOCK + r"attn\.qkv",
    "image.proj": BLOCK + r"attn\.proj",
    "image.mlp": BLOCK + r"mlp\.fc[12]",
    **{f"text.{x}": LAYER + rf"attention\.self\.{x}" for x in ("query", "key", "value")},
    "text.output": LAYER + r"attention\.output\.dense",
    "text.mlp": LAYER + r"(intermediate|output)\.dense",
    **{f"cross.{x}": LAYER + rf"crossattention\.self\.{x}" for x in ("query", "key", "value")},
    "cross.output": LAYER + r"crossattention\.output\.dense",
}


class LowRank(nn.Module):
    """W -> W + scale * B A. B starts at zero, so that training starts at W."""

    scale: Tensor  # alpha / rank; in the state dict, so that a file can be merged without its config

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.empty(rank, columns, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.register_buffer("scale", torch.tensor(alpha / rank, dtype=weight.dtype, device=weight.device))
        nn.init.normal_(self.A, std=columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A)


def add_lora(model: BLIP_Retrieval, lora: dict[str, Any]) -> None:
    """Give the targets their A and B, and freeze their own weights."""
    patterns = [TARGETS[target] for target in lora["targets"]]
    for name, module in list(model.named_modules()):
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            if lora["rank"] > min(module.weight.shape):
                raise ValueError(
                    f"lora: rank {lora['rank']} is above the {min(module.weight.shape)} of {name}: lower it"
                )
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, lora["rank"], lora["alpha"]))
