"""What `gpu_report.py` measures, part by part. Each part emits a row as soon as it has one."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import bench_evaluate, bench_train_step
from benchmarks.bench_evaluate import Inputs, plant_gallery, random_images, rerank_gallery
from configs.schema import RetrievalConfig
from models.blip_retrieval import BLIP_Retrieval, build_model
from retrieval.metrics import retrieval_metrics
from retrieval.rerank import encode_texts, needed_pairs, shortlist
from retrieval.scoring import score_pairs
from training.dry_run import Trial, fitting_micro_batch, synthetic_batch
from training.memory import auto_keep_graphs
from training.schedule import build_optimizer
from utils import choose_precision, memory_mb, precision

ROOT = Path(__file__).parent.parent
Emit = Callable[..., None]  # one row, as keywords
GRADIENT_BOUND = {"fp32": 1e-3, "tf32": 0.05, "bf16": 0.2}  # relative, of the whole gradient


class Sizes(NamedTuple):
    """How large everything is: COCO's recipe and test split at the published size, or a toy."""

    vit: str = "base"
    med_config: str = "configs/med_config.json"
    image_size: int = 384
    queue_size: int = 57600
    batch: int = 256
    ranks: int = 8
    micro_batch: int = 32
    steps: int = 3
    gallery: tuple[int, int] = (5000, 25010)
    part: tuple[int, int] = (1000, 5000)  # what Recall is compared on
    small: tuple[int, int] = (32, 256)  # what the slow ways rank
    k: int = 256
    rerank_tokens: tuple[int, ...] = (32768, 65536, 131072)
    pairs: int = 65536  # that the tokens of a pass are tried on
    precisions: tuple[str, ...] = ("bf16", "tf32", "fp32")  # the most important first
    tests: str = ""  # which of tests/test_device.py; '' = all


TOY = Sizes(
    "nano", "configs/med_small.json", 32, 64, 8, 2, 3, 1, (30, 90), (20, 60), (4, 12), 8, (500, 1000), 60,
    ("bf16", "fp32"), "any_micro_batch and True",
)  # fmt: skip


# ---- checks ---------------------------------------------------------------------------------------------------------


def checks(sizes: Sizes, device: torch.device, emit: Emit) -> None:
    """The tests of `tests/test_device.py` on this device."""
    environment = {**os.environ, "TEST_DEVICE": str(device)}
    if device.type == "cuda" and "CUDA_VISIBLE_DEVICES" not in environment:  # the tests would hide it
        environment |= {"CUDA_VISIBLE_DEVICES": str(device.index or 0), "TEST_DEVICE": "cuda:0"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["tests/test_device.py", *(["-k", sizes.tests] if sizes.tests else [])]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            name, _, outcome = line.partition(" ")
            if "::" in name and outcome.split():
                emit(check=name.partition("::")[2], outcome=outcome.split()[0].lower())
            elif "Error" in line:
                print(line.rstrip(), flush=True)
    if process.returncode:
        raise RuntimeError(f"tests/test_device.py has failed with status {process.returncode}")


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluation(sizes: Sizes, device: torch.device, emit: Emit) -> None:
    """Recall against float32 on a part of a split; the slow ways on a small gallery; last the whole split.

    In the default precision. RuntimeError in the end if a Recall differs.
    """
    default = default_precision(device)
    args = bench_evaluate.parse_args(
        ["--device", str(device), "--precision", default, "--vit", sizes.vit, "--image_size", str(sizes.image_size),
         "--med_config", sizes.med_config, "--k", str(sizes.k), "--rerank_tokens", str(sizes.rerank_tokens[0])]
    )  # fmt: skip
    args.images, args.small, args.ablation_pairs = min(64, sizes.part[0]), sizes.small, 16 * sizes.small[0]
    model = BLIP_Retrieval(args.med_config, args.image_size, args.vit, queue_size=64).to(device).eval()
    with torch.inference_mode():
        rank_split(model, (args.small[0], 4 * args.small[1]), default, args, device)  # warms up
        recall, args.k = {}, args.k // 2  # float32 takes its time
        for name in dict.fromkeys((default, "fp32")):
            row, recall[name] = rank_split(model, sizes.part, name, args, device)
            emit(**row)
        equal = recall[default] == recall["fp32"]
        emit(what=f"Recall of {default} against fp32", images=sizes.part[0], equal=equal)
    args.gallery, args.k = sizes.gallery, sizes.k
    outcome = bench_evaluate.compare(args, device)
    for words, pairs, seconds, _ in outcome.rows:
        faster = {"x_published": outcome.rows[0][2] / seconds, "x_transformers": outcome.rows[1][2] / seconds}
        emit(what=words.replace("*", ""), precision=default, pairs=pairs, split_seconds=seconds, **faster)
    for line in outcome.lines:
        emit(what=line)
    with torch.inference_mode():
        emit(**rank_split(model, sizes.gallery, default, args, device)[0])
    if not equal or any(line.startswith("this repository:") and "DIFFERENT" in line for line in outcome.lines):
        raise RuntimeError("a Recall differs, see the rows")


def default_precision(device: torch.device) -> str:
    """That of evaluation, and of the first steps: bf16, but where a card has none and emulates it."""
    return "fp32" if device.type == "cuda" and choose_precision("auto", device, True) != "bf16" else "bf16"


def rank_split(
    model: BLIP_Retrieval, size: tuple[int, int], name: str, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], dict[str, float]]:
    """Encode and rank random images, with planted features, as `--evaluate` does: a row, and Recall."""
    args = argparse.Namespace(**vars(args) | {"gallery": size, "k": min(args.k, *size)})
    gallery, everyone = plant_gallery(*size, model.text_encoder.config.vocab_size), np.arange(size[1])
    pairs = needed_pairs(shortlist(gallery.image_feat, gallery.text_feat, everyone, args.k), everyone)
    torch.manual_seed(0)  # the same pictures for every precision
    reset_peak(device)
    times = [now(device)]
    with precision(model, "fp32"):  # the encoders', as in `rerank`
        texts = encode_texts(model, gallery.text, args.rerank_tokens)
        times.append(now(device))
        images = random_images(size[0], model, args.image_size)
        times.append(now(device))
    with precision(model, name):
        ranking = rerank_gallery(model, gallery, Inputs(images, texts, pairs.image, pairs.text), args)
    times.append(now(device))
    text_seconds, image_seconds, rank_seconds = np.diff(times).tolist()
    ids = gallery.image_ids, gallery.text_ids
    row = {
        "what": "encode and rank", "precision": name, "images": size[0], "captions": size[1],
        "seconds": times[-1] - times[0], "pairs": len(pairs.image), "pairs_per_second": len(pairs.image) / rank_seconds,
        "images_per_second": size[0] / image_seconds, "captions_per_second": size[1] / text_seconds,
        "peak_gb": memory_mb(device) / 1e3,
    }  # fmt: skip
    return row, retrieval_metrics(ranking.i2t, ranking.i2t_value, ranking.t2i, ranking.t2i_value, *ids)


# ---- training -------------------------------------------------------------------------------------------------------


def step_args(sizes: Sizes, device: torch.device, precisions: Sequence[str]) -> argparse.Namespace:
    """A step of COCO's recipe."""
    return bench_train_step.parse_args(
        ["--device", str(device), "--precision", *precisions, "--vit", sizes.vit, "--image_size",
         str(sizes.image_size), "--med_config", sizes.med_config, "--queue_size", str(sizes.queue_size), "--batch",
         str(sizes.batch), "--ranks", str(sizes.ranks), "--micro_batch", str(sizes.micro_batch), "--steps",
         str(sizes.steps), "--warm_up", "1"]
    )  # fmt: skip


def precisions_of(sizes: Sizes, device: torch.device) -> list[str]:
    return [name for name in sizes.precisions if name != "bf16" or default_precision(device) == "bf16"]


def training(sizes: Sizes, device: torch.device, emit: Emit) -> None:
    """The published step and this one in each precision; RuntimeError in the end if their gradients differ."""
    precisions = precisions_of(sizes, device)
    args = step_args(sizes, device, precisions)
    model = bench_train_step.build_model(args).to(device).train()
    batch = synthetic_batch(args.batch, args.image_size, model.text_encoder.config.vocab_size)
    some = bench_train_step.first_samples(batch, args.compare, device)
    apart = bench_train_step.compare_gradients(model, some, args)
    for name, (whole, worst) in apart.items():
        emit(step="gradient against published fp32", precision=name, differs=whole, worst_parameter=worst)
    ways, published = bench_train_step.all_ways(model, batch, args), {}
    for name in precisions:
        some = [way for way in ways if way.precision == name]
        bench_train_step.measure(some, args, device)
        for way in some:
            emit(**step_row(way, args, device))
            if way.words == "published" and way.seconds:
                published[name] = median(way.seconds)
    for way in ways:
        if "repository" in way.words and way.seconds:
            faster = {f"x_published_{name}": seconds / median(way.seconds) for name, seconds in published.items()}
            emit(step="how many times faster than published", precision=way.precision, **faster)
    if any(whole > GRADIENT_BOUND[name] for name, (whole, _) in apart.items()):
        raise RuntimeError("a gradient differs, see the rows")


def compiled(sizes: Sizes, device: torch.device, emit: Emit) -> None:
    """This repository's step in the first precision with compiled encoders, which takes minutes to start."""
    args = step_args(sizes, device, precisions_of(sizes, device)[:1])
    args.compile = True
    model = bench_train_step.build_model(args).to(device).train()
    batch = synthetic_batch(args.batch, args.image_size, model.text_encoder.config.vocab_size)
    way = bench_train_step.all_ways(model, batch, args)[-1]
    bench_train_step.measure([way], args, device)
    emit(**step_row(way, args, device))


def step_row(way: bench_train_step.Way, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"step": way.words.replace("*", ""), "precision": way.precision}
    if not way.seconds:
        return row | {"outcome": "out of memory"}
    seconds = median(way.seconds)
    row |= {"seconds": seconds, "images_per_second": args.batch / seconds, "peak_gb": way.megabytes / 1e3}
    if device.type == "cuda" and "repository" in way.words:
        row["host_bound_share"] = max(0.0, 1 - kernel_seconds(way.run) / seconds)
    return row


def kernel_seconds(work: Callable[[], None]) -> float:
    """How long the GPU itself is busy with it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


# ---- limits ---------------------------------------------------------------------------------------------------------


def limits(sizes: Sizes, device: torch.device, emit: Emit) -> None:
    """The largest micro-batch, how many graphs are kept, and how many tokens of a pass are the fastest."""
    cfg = RetrievalConfig(
        "coco", vit=sizes.vit, med_config=sizes.med_config, image_size=sizes.image_size, queue_size=sizes.queue_size,
        batch_size_train=sizes.micro_batch, global_batch_size=sizes.batch, ranks_emulated=sizes.ranks,
    )  # fmt: skip
    model = build_model(cfg).to(device)
    with torch.inference_mode():
        try_tokens(model.eval(), sizes, device, emit)
    batch = synthetic_batch(sizes.batch, sizes.image_size, model.text_encoder.config.vocab_size)
    trial = Trial(model.train(), cfg, batch, build_optimizer(model, cfg), device)
    for name in precisions_of(sizes, device)[:2]:
        with precision(model, name):
            size, words = fitting_micro_batch(trial, sizes.batch)
            emit(limit=words, precision=name)
            kept = auto_keep_graphs(model, sizes.image_size, size, sizes.batch, trial.optimizer, trial.pool)
            emit(limit=f"keep_graphs auto: {kept} of {sizes.batch}, in micro-batches of {size}", precision=name)


def try_tokens(model: BLIP_Retrieval, sizes: Sizes, device: torch.device, emit: Emit) -> None:
    images = random_images(sizes.small[0], model, sizes.image_size)
    gallery = plant_gallery(sizes.small[0], 4 * sizes.small[1], model.text_encoder.config.vocab_size)
    texts = encode_texts(model, gallery.text, sizes.rerank_tokens[0])
    image = np.repeat(np.arange(sizes.small[0]), sizes.pairs // sizes.small[0])
    text = np.arange(len(image)) % len(texts.lengths)
    for tokens in sizes.rerank_tokens:
        with precision(model, default_precision(device)):
            score_pairs(model, images, texts, image[: len(image) // 4], text[: len(image) // 4], tokens)  # warms up
            reset_peak(device)
            start = now(device)
            score_pairs(model, images, texts, image, text, tokens)
            rate = len(image) / (now(device) - start)
        peak = {"pairs_per_second": rate, "peak_gb": memory_mb(device) / 1e3}
        emit(limit=f"rerank_tokens {tokens}", precision=default_precision(device), **peak)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def now(device: torch.device) -> float:
    """Seconds, when all the device's work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS = {"checks": checks, "training": training, "limits": limits, "evaluation": evaluation, "compiled": compiled}
