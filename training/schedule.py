"""Learning rate, optimizer groups and the weight of momentum targets, as functions of the step.

Source: BLIP's `train_retrieval.py` and `utils.py` (Li et al., ICML 2022). Warm-up and group rates are additions.
"""

import math

import torch
from torch import nn

from configs.schema import RetrievalConfig
from models.blip_retrieval import BLIP_Retrieval
from models.freezing import depths_below_heads


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """BLIP's schedule: one value per epoch, from init_lr at epoch 0 towards min_lr."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def build_optimizer(model: BLIP_Retrieval, cfg: RetrievalConfig) -> torch.optim.Optimizer:
    """AdamW on everything that trains, weight decay included, as BLIP does; `scale` multiplies a group's rate."""
    depths = depths_below_heads(model) if cfg.layer_decay < 1 else {}
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p is not model.temp:
            by_scale.setdefault(cfg.layer_decay ** depths.get(name, 0), []).append(p)
    groups = [{"params": params, "scale": scale} for scale, params in by_scale.items()]
    groups.append({"params": [model.temp], "scale": cfg.temp_lr_scale})
    return torch.optim.AdamW(groups, lr=cfg.init_lr, weight_decay=cfg.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, cfg: RetrievalConfig, epoch: int, global_step: int) -> float:
    lr = cosine_lr(epoch, cfg.max_epoch, cfg.init_lr, cfg.min_lr)
    if global_step < cfg.warmup_steps:
        lr *= (global_step + 1) / cfg.warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def ramped_alpha(alpha: float, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Weight of the momentum targets: 0 -> alpha over epoch 0, alpha afterwards."""
    return alpha if epoch > 0 else alpha * min(1.0, step / steps_per_epoch)
