"""How many image graphs stay in memory during a step. It changes speed and memory, not the method."""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from models.arrangements import POPULAR, TrainingTexts
from models.blip_retrieval import BLIP_Retrieval
from training.failures import gpu_memory_is_full
from transform.text import TokenizedText

log = logging.getLogger("blip")

MARGIN = 0.9  # of the free GPU memory: the rest is lost to fragmentation and to what other libraries allocate
CONTRAST_MATRICES = 8  # (m, Q) of float32, that the contrast of a micro-batch holds at its peak


class TooLarge(ValueError):
    """Not one micro-batch fits into the GPU's memory."""


def auto_keep_graphs(
    model: BLIP_Retrieval,
    image_size: int,
    micro_batch: int,
    samples: int,
    optimizer: torch.optim.Optimizer,
    pool: int,
) -> int:
    """How many of the `samples` image graphs of a step fit into free memory: `keep_graphs: auto`.

    Measured on one micro-batch of random pixels, in the current precision. Call it between steps: it clears gradients.
    Room is left for matching that micro-batch when all `pool` texts that may draw one of its images do so, and for
    what the `optimizer` is still to allocate. On the CPU one image is measured, and kept graphs get half of the
    available memory. TooLarge if not one micro-batch fits.
    """
    micro_batch = min(micro_batch, samples)
    training, device = model.training, model.temp.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        if device.type == "cuda":
            graph, free = _measure_gpu(model, image_size, micro_batch, samples, optimizer, pool)
        else:
            graph = _saved_bytes(model, torch.randn(1, 3, image_size, image_size, dtype=model.temp.dtype))
            free = _host_memory() // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        model.train(training)
    kept = min(samples, max(micro_batch, int(free // graph)))
    log.info("keep_graphs: %d of %d, an image's graph takes %.0f MB", kept, samples, graph / 1e6)
    return kept


def pool_of_texts(model: BLIP_Retrieval, global_batch: int, ranks: int) -> int:
    """How many texts of a step may draw images of the same micro-batch as their negatives."""
    return global_batch if model.negative_all_rank else global_batch // ranks


def _measure_gpu(
    model: BLIP_Retrieval, image_size: int, micro_batch: int, samples: int, optimizer: torch.optim.Optimizer, pool: int
) -> tuple[float, float]:
    """Bytes of an image's graph, and bytes that graphs may take."""
    device = model.temp.device
    available = free_gpu_memory(device)
    before = torch.cuda.memory_allocated(device)
    measured = _try_micro_batch(model, image_size, micro_batch, before, pool)
    if measured is None:
        measured = _try_micro_batch(model, image_size, micro_batch, before, micro_batch)
        available = 0  # so that no more than one micro-batch is kept
        if measured is not None:
            log.warning(
                "warning: batch_size_train %d fits, but not if all texts of a step draw its images: lower it should "
                "the GPU's memory ever be full",
                micro_batch,
            )
    if measured is None:
        available = free_gpu_memory(device)
        raise TooLarge(
            f"batch_size_train {micro_batch} does not fit into {available / 1e9:.1f} GB of free GPU memory: lower it "
            "(it is the micro-batch: the method stays the same), or raise vit_ckpt_layer (with vit_grad_ckpt true), or "
            "set precision bf16. --dry_run finds the largest that fits."
        )
    graph, peak = measured
    pixels = samples * 3 * image_size**2 * 4  # of all samples of a step; the measurement held one micro-batch
    contrast = CONTRAST_MATRICES * micro_batch * model.queue_size * 4
    rest = peak - graph + pixels + contrast + _missing_state(optimizer)
    return graph / micro_batch, MARGIN * available - rest


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: free ones, and those its allocator holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _try_micro_batch(
    model: BLIP_Retrieval, image_size: int, size: int, before: int, pool: int
) -> tuple[int, int] | None:
    """`run_micro_batch`, or None if the GPU's memory is too small for it."""
    try:
        return run_micro_batch(model, image_size, size, before, pool)
    except RuntimeError as error:
        if not gpu_memory_is_full(error):
            raise
    torch.cuda.empty_cache()  # here the traceback no longer holds any tensor
    return None


def worst_pairs(size: int, pool: int) -> list[int]:
    """The image of each pair of a micro-batch of `size` images, when all `pool` texts draw one of them.

    Each image also has its own text and the text it drew. One is as popular as it may be without a call of its own,
    which makes the attention's rectangle the largest. Over a whole step there are three pairs an image.
    """
    most = min(pool, POPULAR * (2 * size + pool) // size - 2)
    others = [1 + i % max(1, size - 1) for i in range(pool - most)]
    return sorted([*range(size), *range(size), *[0] * most, *others])


def run_micro_batch(
    model: BLIP_Retrieval, image_size: int, size: int, before: int = 0, pool: int = 0
) -> tuple[int, int]:
    """Encode random images and match their worst pairs, forward and backward: bytes of the graph, bytes at the peak."""
    device = model.temp.device
    try:
        image_tokens = model.encode_image(torch.randn(size, 3, image_size, image_size, device=device))
        graph = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        image = worst_pairs(size, pool)
        length = model.tokenizer.max_tokens
        ids = torch.ones(len(image), length, dtype=torch.long, device=device)
        arrangement = TrainingTexts([length] * len(ids), device, image, size)
        logits = model.match(TokenizedText(ids, torch.ones_like(ids)), image_tokens, arrangement)
        (logits.sum() + model.image_feature(image_tokens).sum()).backward()
        return graph, torch.cuda.max_memory_allocated(device) - before
    finally:
        model.zero_grad()


def _missing_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the two moments that AdamW will allocate in its first step."""
    return sum(2 * p.nbytes for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state)


def _saved_bytes(model: BLIP_Retrieval, image: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of these images, not counting weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        image_tokens = model.encode_image(image)
    return image_tokens.nbytes + sum(x.untyped_storage().nbytes() for x in saved.values())


def _host_memory() -> int:
    """Available bytes: of the machine, or less where a container's limit is lower."""
    lines = _read("/proc/meminfo").splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if not available:  # not Linux; on Windows it is not known, and only one micro-batch is kept
        known = hasattr(os, "sysconf")
        available = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if known else 0]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        available.append(max(0, int(limit) - int(used)))
    return min(available)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
