"""`compile: true`: both encoders under torch.compile. It changes speed and memory; gradients are equal to rounding."""

import torch
from torch import nn

from models.blip_retrieval import BLIP_Retrieval
from models.med import Intermediate, ResidualOutput


def compile_encoders(model: BLIP_Retrieval) -> None:
    """`compile: true`: fuse what lies between the matrix products of both encoders and of their twins, in place.

    Names in the state dict stay. An image block is compiled whole, but where its forward is recomputed (checkpointing,
    stochastic depth) only its MLP. Of a text layer it is the MLP and dropout + add + LayerNorm, whatever the
    arrangement of tokens.
    """
    torch._dynamo.config.recompile_limit = 64  # modes x shapes: train, no_grad, eval, a last smaller batch
    for module in _to_compile(model):
        module.compile()


def _to_compile(model: BLIP_Retrieval) -> list[nn.Module]:
    chosen: list[nn.Module] = []
    for image_encoder in (model.visual_encoder, model.visual_encoder_m):
        for block in image_encoder.blocks:
            checkpointed = "forward" in vars(block)  # patched by fairscale
            chosen += [block.mlp] if checkpointed or image_encoder.stochastic else [block]
    for text_encoder in (model.text_encoder, model.text_encoder_m):
        chosen += [m for m in text_encoder.modules() if isinstance(m, ResidualOutput | Intermediate)]
    return chosen
