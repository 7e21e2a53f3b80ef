"""A config against its training set, BLIP's published recipe and the machine, before the first step.

Source of the numbers: Li et al., ICML 2022, table 14: AdamW, learning rate 1e-5 (ViT-L 5e-6), 256 pairs in a step. For
another batch the square-root rule scales the learning rate, and the momentum encoders move equally fast per sample.
"""

import math
import os
import shutil
from pathlib import Path

import numpy as np

from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.findings import Findings, cores
from data.loaders import recipe_sampler

BATCH, MOMENTUM, QUEUE = 256, 0.995, 57600
RATES = {"large": 5e-6}
RATE = 1e-5  # of the others
FEW_STEPS = 100
FROM_TOWERS = 5e-5  # init_lr below which what is random hardly trains


def check_recipe(cfg: RetrievalConfig, table: Annotations) -> Findings:
    """The config against the size of its training set, the published recipe and the machine."""
    found, batch, pairs = Findings(), cfg.global_batch_size, len(table.captions)
    try:
        steps = len(recipe_sampler(cfg, table, seed=0))
    except ValueError as error:
        return Findings(errors=[f"{table.source}: {error}"])
    found.facts.append(f"{steps} steps an epoch of {batch} pairs, {steps * cfg.max_epoch} steps in all")
    better = max(batch, min(QUEUE, pairs // 4 // batch * batch))
    if cfg.queue_size > pairs / 2 and better < cfg.queue_size:
        found.warnings.append(
            f"queue_size {cfg.queue_size} is large for {pairs} training pairs: the queue would hold each image "
            f"{cfg.queue_size / len(table.images):.1f} times, in stale copies: set queue_size to {better}"
        )
    if (cfg.image_tower or cfg.text_tower) and cfg.init_lr < FROM_TOWERS:
        found.warnings.append(
            f"init_lr {cfg.init_lr:g} is one to fine-tune a whole BLIP with; from towers, cross-attention and heads "
            "start at random: set init_lr to about 2e-4, with warmup_steps and random_negative_steps, and layer_decay "
            "below 1 for the towers"
        )
    if cfg.pretrained:
        found.warnings += recipe_warnings(cfg, steps * cfg.max_epoch)
    workers, available = cfg.num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), cores()
    if workers > available:
        found.warnings.append(f"num_workers {cfg.num_workers} makes {workers} loaders on {available} cores: lower it")
    return found


def recipe_warnings(cfg: RetrievalConfig, steps: int) -> list[str]:
    """Learning rate and momentum off by more than a factor of two from the rule of the shipped configs, few steps."""
    warnings, share = [], cfg.global_batch_size / BATCH
    published = RATES.get(cfg.vit, RATE)
    rate, momentum = published * math.sqrt(share), MOMENTUM**share
    whole = "" if share == 1 else ", or global_batch_size to 256 and ranks_emulated to 8"
    if not 0.5 <= cfg.init_lr / rate <= 2.001:
        warnings.append(
            f"init_lr {cfg.init_lr:g} at a global batch of {cfg.global_batch_size}: the published {published:g} at 256 "
            f"is {rate:.2g} here by the square-root rule: set init_lr to {rate:.2g}{whole}"
        )
    if not 0.5 <= (1 - cfg.momentum) / (1 - momentum) <= 2.001:
        warnings.append(
            f"momentum {cfg.momentum:g} at a global batch of {cfg.global_batch_size}: to move the momentum encoders as "
            f"fast as the published {MOMENTUM} at 256, set momentum to {momentum:.5f}{whole}"
        )
    if steps < FEW_STEPS:
        warnings.append(
            f"{steps} optimizer steps in all are few to fine-tune with: raise max_epoch, or lower global_batch_size "
            "and with it init_lr (square-root rule)"
        )
    return warnings


def check_disk(folder: Path, size: int, keep_last: int) -> Findings:
    """Room for the saves of a run in `folder`, each of `size` bytes."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "is not a folder" if not parent.is_dir() else "is not writable"
        return Findings(errors=[f"--output_dir {folder}: {parent} {reason}: name another folder"])
    files = keep_last + 2  # besides them the best weights, and one that is being written
    there = sum(path.stat().st_size for path in folder.glob("checkpoint_*.pth"))
    free = shutil.disk_usage(parent).free
    line = f"{files} checkpoints of {_gigabytes(size)} at most, {_gigabytes(free)} free in {parent}"
    if free + there >= files * size:
        return Findings(facts=[line])
    return Findings(errors=[f"the disk is too full: {line}: make room, lower keep_last, or name another --output_dir"])


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def require_negatives(cfg: RetrievalConfig, table: Annotations, seed: int) -> None:
    """ValueError for the first step in which all samples of a pool show one image, so that no negative exists.

    The order of all epochs is known, so this is known before the first step.
    """
    pool = cfg.global_batch_size if cfg.negative_all_rank else cfg.global_batch_size // cfg.ranks_emulated
    if np.bincount(table.caption_ids).max() < pool and pool <= len(table.captions):
        return  # no id can fill a pool
    sampler = recipe_sampler(cfg, table, seed)
    for epoch in range(cfg.max_epoch):
        sampler.set_epoch(epoch)
        for step, batch in enumerate(sampler):
            indices = np.array([index for _, index in batch]).reshape(-1, pool)
            ids = table.caption_ids[indices]  # (pools, samples)
            alone = (ids == ids[:, :1]).all(1)
            if alone.any():
                index = int(indices[alone.argmax(), 0])
                raise ValueError(
                    f"{table.source}: in epoch {epoch}, step {step} all {pool} samples that may be each other's "
                    f"negatives show the same image (first file {table.images[table.caption_image[index]]}). Use a "
                    "larger batch, set negative_all_rank: true, or give different images different image_id."
                )
