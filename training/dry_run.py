"""What a run will cost on this machine, measured before it starts: steps, re-ranking, and the largest micro-batch.

Shapes: n samples of a step on this process, S pixels a side, L text tokens, N images and M captions of a gallery.
"""

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoints.load import load_pretrained
from configs.schema import RetrievalConfig
from data.loaders import recipe_sampler, train_loader
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from models.towers import start_from_towers
from retrieval.rerank import encode_images, encode_texts
from retrieval.scoring import score_pairs
from training.compilation import compile_encoders
from training.failures import gpu_memory_is_full
from training.memory import auto_keep_graphs, pool_of_texts, run_micro_batch
from training.preflight import Job
from training.schedule import build_optimizer
from training.step import train_step
from transform.text import CLS, MAX_TOKENS, SEP, TokenizedText
from utils import all_reduce_sum, average_gradients, get_rank, get_world_size, is_main, memory_mb, precision

# Captions of 8, 9, ... 35 tokens among the 25,000 of COCO's Karpathy test split.
CAPTION_LENGTHS = (1, 147, 2729, 4513, 5069, 4241, 3048, 1963, 1216, 721, 423, 288, 179, 127, 89, 50, 41, 36, 25, 25,
                   17, 4, 9, 7, 9, 8, 7, 8)  # fmt: skip
WARM_UP, TIMED = 2, 3  # steps
CPU_SECONDS = 10.0  # where a step takes longer, fewer samples are timed: about this long


class DrySizes(NamedTuple):
    """How much data the run goes through."""

    train_captions: int
    val_images: int
    val_captions: int


def synthetic_captions(count: int, vocab_size: int) -> TokenizedText:
    """Random words, always the same, with the lengths of COCO's captions: (count, 35)."""
    rng = np.random.default_rng(0)
    share = np.array(CAPTION_LENGTHS) / sum(CAPTION_LENGTHS)
    lengths = rng.choice(np.arange(8, MAX_TOKENS + 1), count, p=share)[:, None]  # (count, 1)
    place = np.arange(MAX_TOKENS)  # (35,)
    first_word = min(1000, vocab_size // 2)
    ids = np.where(place < lengths, rng.integers(first_word, vocab_size - 2, (count, MAX_TOKENS)), 0)
    ids[:, 0] = min(CLS, vocab_size - 1)
    np.put_along_axis(ids, lengths - 1, min(SEP, vocab_size - 1), axis=1)
    return TokenizedText(torch.from_numpy(ids), torch.from_numpy((place < lengths).astype(np.int64)))


def synthetic_batch(count: int, image_size: int, vocab_size: int) -> TrainBatch:
    """Random pixels and words, always the same; no two samples share an image."""
    pixels = torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    names = [f"random {i}" for i in range(count)]
    return TrainBatch(pixels, synthetic_captions(count, vocab_size), torch.arange(count), names)


def dry_run(
    model: BLIP_Retrieval, cfg: RetrievalConfig, sizes: DrySizes, batch: TrainBatch, device: torch.device
) -> list[str]:
    """Report lines on memory, speed and hours, measured on a step's `batch` of this process; it trains the model.

    The times leave out the loader. Every process must call it. ValueError if not a single sample fits into
    memory.
    """
    local = cfg.global_batch_size // get_world_size()
    if cfg.compile:
        compile_encoders(model)
    trial = Trial(model, cfg, batch, build_optimizer(model, cfg), device)
    model.train()
    with precision(model, cfg.precision):
        micro_batch, memory_line = fitting_micro_batch(trial, local)
        if isinstance(cfg.keep_graphs, int):
            kept = cfg.keep_graphs
        else:
            kept = auto_keep_graphs(model, cfg.image_size, micro_batch, local, trial.optimizer, trial.pool)
        seconds, timed, megabytes = time_steps(trial, local, micro_batch, kept)
    rates = evaluation_rates(model.eval(), cfg, sizes)
    return [
        f"{hardware(device)}; ViT-{cfg.vit} at {cfg.image_size} px, {cfg.precision}, torch {torch.__version__}",
        f"training step: {seconds:.2f} s for {cfg.global_batch_size} samples ({cfg.ranks_emulated} ranks), "
        f"{cfg.global_batch_size / seconds:.1f} images/s{'' if timed == local else f', from {timed} samples a step'}; "
        f"micro-batches of {micro_batch}, {min(max(kept, micro_batch), local)} of {local} image graphs kept",
        f"peak memory: {megabytes / 1e3:.1f} GB{_total_memory(device)}",
        memory_line,
        *saved_by_freezing(trial, local, micro_batch, cfg.precision),
        *hours(cfg, sizes, seconds, rates),
    ]


def print_dry_run(model: BLIP_Retrieval, job: Job) -> None:
    """Print what the run would cost here, from a few steps on its first batch; writes nothing."""
    cfg, table, val = job.cfg, job.splits["train"], job.splits["val"]
    if cfg.pretrained:
        load_pretrained(model, cfg.pretrained, cfg.cache_dir)
    elif job.plan.image or job.plan.text:
        start_from_towers(model, job.plan)
    sampler = recipe_sampler(cfg, table, job.args.seed, get_world_size(), get_rank())
    batch = next(iter(train_loader(cfg, table, sampler, model.temp.device)))
    sizes = DrySizes(len(table.captions), len(val.images), len(val.captions))
    for line in dry_run(model, cfg, sizes, batch, model.temp.device):
        if is_main():
            print(line)


# ---- training -------------------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What a trial step needs."""

    model: BLIP_Retrieval
    cfg: RetrievalConfig
    batch: TrainBatch
    optimizer: torch.optim.Optimizer
    device: torch.device

    def gradients(self, samples: int, ranks: int, micro_batch: int, keep_graphs: int) -> None:
        """The gradients of a step on the batch's first `samples`."""
        text = TokenizedText(*(x[:samples] for x in self.batch.text))
        image, idx = (x[:samples].to(self.device, non_blocking=True) for x in (self.batch.image, self.batch.idx))
        self.model.zero_grad()
        train_step(self.model, image, text, idx, self.cfg.alpha, ranks, micro_batch, keep_graphs)

    @property
    def pool(self) -> int:
        return pool_of_texts(self.model, self.cfg.global_batch_size, self.cfg.ranks_emulated)

    def update(self) -> None:
        average_gradients(self.model)
        self.optimizer.step()


def saved_by_freezing(trial: Trial, local: int, micro_batch: int, arithmetic: str) -> list[str]:
    """What frozen parts save: weights that the momentum twins share, and a second pass through the image stem."""
    model = trial.model
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and "_m." not in name]
    if not frozen:
        return []
    twins = [p for _, twin in model.twins() for p in twin.parameters()]
    shared = sum(p.nbytes for p in twins if any(p is q for q in frozen))
    count = sum(p.numel() for p in frozen)
    line = (
        f"frozen: {count / 1e6:.1f} M parameters, without gradient and moments ({12 * count / 1e6:.0f} MB less); the "
        f"momentum twins share {shared / 1e6:.0f} MB of weights"
    )
    if not model.visual_encoder.stem_frozen:
        return [line]
    image = trial.batch.image[:micro_batch].to(trial.device)
    model.train()
    with precision(model, arithmetic):
        seconds, _ = _seconds(trial.device, lambda: model.image_stem(image))
    saved = seconds * local / len(image)
    return [line + f", and its one pass through the image stem saves a second one: {saved:.2f} s a step"]


def fitting_micro_batch(trial: Trial, local: int) -> tuple[int, str]:
    """batch_size_train, or less if that does not fit, and a line about the largest that does."""
    wanted = min(trial.cfg.batch_size_train, local)
    if trial.device.type != "cuda" or get_world_size() > 1:
        why = "on a CPU, memory is not the limit" if trial.device.type != "cuda" else "use one process to search"
        return wanted, f"largest batch_size_train that fits: not searched, {why}"

    def fits(size: int) -> bool:
        try:
            trial.gradients(min(2 * size, local), 1, size, 0)
            trial.update()  # allocates the optimizer's state before anything larger is tried
            run_micro_batch(trial.model, trial.cfg.image_size, size, pool=trial.pool)
            torch.cuda.synchronize(trial.device)
            return True
        except RuntimeError as error:
            if not gpu_memory_is_full(error):
                raise
        trial.model.zero_grad()
        torch.cuda.empty_cache()
        return False

    largest = largest_that_fits(fits, wanted, local)
    if not largest:
        raise ValueError(
            "not a single image fits into GPU memory: set vit_grad_ckpt true with vit_ckpt_layer at the number of "
            "blocks, precision bf16, or a smaller image_size."
        )
    lower = "" if largest >= wanted else f"; {wanted} does not fit: set batch_size_train to {largest}, same method"
    return min(wanted, largest), f"largest batch_size_train that fits: {largest} (of {local} samples a step){lower}"


def largest_that_fits(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Double `start` while it fits, up to `most`, or halve it until it does; 0 if nothing fits."""
    size = start
    while size and not fits(size):
        size //= 2
    while size >= start and size < most and fits(min(2 * size, most)):
        size = min(2 * size, most)
    return size


def time_steps(trial: Trial, local: int, micro_batch: int, keep_graphs: int) -> tuple[float, int, float]:
    """Seconds of a whole step, samples it was measured on, peak memory in MB.

    Where a step takes minutes, fewer samples are timed. What happens once a step, whatever its samples, is timed apart
    and not scaled.
    """
    samples, ranks = local, trial.cfg.ranks_emulated // get_world_size()
    if trial.device.type != "cuda":
        probe, _ = _seconds(trial.device, lambda: trial.gradients(2, 1, micro_batch, keep_graphs))
        samples = max(2, min(local, int(2 * CPU_SECONDS / probe)))
        ranks = ranks if samples == local else 1

    def step() -> None:
        trial.gradients(samples, ranks, micro_batch, keep_graphs)
        trial.update()

    for _ in range(WARM_UP):
        step()
    if trial.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trial.device)
    seconds = median(_seconds(trial.device, step)[0] for _ in range(TIMED))
    if samples < local:
        once, _ = _seconds(trial.device, lambda: (trial.update(), trial.model.update_momentum()))
        once = min(once, seconds)
        seconds = (seconds - once) * local / samples + once
    return seconds, samples, memory_mb(trial.device)


def _seconds(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, averaged over processes so that all decide alike, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    return all_reduce_sum(elapsed).item() / get_world_size(), result


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Per second, of all processes together."""

    images: float
    texts: float
    pairs: float


@torch.inference_mode()
def evaluation_rates(model: BLIP_Retrieval, cfg: RetrievalConfig, sizes: DrySizes) -> Rates:
    """Encode and score a small random gallery, with up to as many pairs per image as the real one."""
    device, cuda = model.temp.device, model.temp.device.type == "cuda"
    block, num_texts = (min(16, cfg.batch_size_test), 2048) if cuda else (1, 32)
    num_images = block * get_world_size()  # one block for each process
    pixels = torch.randn(block, 3, cfg.image_size, cfg.image_size)
    captions = synthetic_captions(num_texts, model.text_encoder.config.vocab_size)
    with precision(model, "tf32" if cfg.eval_precision == "tf32" else "fp32"):  # the encoders', as in `rerank`
        for _ in range(2):  # the first warms up
            image_seconds, images = _seconds(device, lambda: encode_images(model, [pixels], num_images, block))
            text_seconds, texts = _seconds(device, lambda: encode_texts(model, captions, cfg.rerank_tokens))
    real = -(-max_pairs(cfg, sizes) // sizes.val_images)  # pairs per image of the real gallery, rounded up
    with precision(model, cfg.eval_precision):
        for per_image in (min(8 * 4**i, real) for i in range(20)):  # until it takes a second: small sets mislead
            image = np.repeat(np.arange(num_images), per_image)
            text = np.arange(len(image)) % len(texts.lengths)
            score = partial(score_pairs, model, images, texts, image, text, cfg.rerank_tokens)
            if per_image <= 8:
                score()  # warms up
            pair_seconds, _ = _seconds(device, score)
            if per_image == real or pair_seconds > 1:
                break
    return Rates(num_images / image_seconds, num_texts / text_seconds, len(image) / pair_seconds)


def max_pairs(cfg: RetrievalConfig, sizes: DrySizes) -> int:
    """Both directions' shortlists; they share about a sixth of their pairs on COCO, so this is an upper bound."""
    images, captions = sizes.val_images, sizes.val_captions
    return min(images * captions, images * min(cfg.k_test, captions) + captions * min(cfg.k_test, images))


# ---- report ---------------------------------------------------------------------------------------------------------


def hours(cfg: RetrievalConfig, sizes: DrySizes, step_seconds: float, rates: Rates) -> list[str]:
    """Lines on an epoch, an evaluation and the whole run."""
    steps = sizes.train_captions // cfg.global_batch_size
    pairs = max_pairs(cfg, sizes)
    epoch = steps * step_seconds
    evaluation = sizes.val_images / rates.images + sizes.val_captions / rates.texts + pairs / rates.pairs
    evaluations = cfg.eval_before + cfg.max_epoch + 1  # after each epoch, and of the test split
    total = cfg.max_epoch * epoch + evaluations * evaluation
    return [
        f"an epoch: {epoch / 3600:.3g} h, {steps} steps of {cfg.global_batch_size} "
        f"from {sizes.train_captions} captions "
        "if the loader keeps up",
        f"an evaluation: {evaluation / 3600:.3g} h for {sizes.val_images} images and {sizes.val_captions} captions "
        f"({rates.images:.1f} images/s, {rates.texts:.0f} captions/s, at most {pairs} pairs at {rates.pairs:.0f}/s)",
        f"the run: {total / 3600:.3g} h, {cfg.max_epoch} epochs and {evaluations} evaluations",
    ]


def hardware(device: torch.device) -> str:
    """The device's name and how many of it this run uses."""
    if device.type == "cuda":
        return f"{get_world_size()} x {torch.cuda.get_device_name(device)}"
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {get_world_size()} x {torch.get_num_threads()} threads"


def _total_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return " of host memory"
    return f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB on the GPU"
