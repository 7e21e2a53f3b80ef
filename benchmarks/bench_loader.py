"""What loading costs: images a second of one core, the share of each transform, and what several workers feed.

    python -m benchmarks.bench_loader [--image_size 384] [--images 200] [--workers 2 4 8 16]

Drawn JPEG files of 640 x 480 pixels. First each stage by itself, in this process on one thread, image after image, so
that a slow spell meets all of them; then whole loaders, without the batches that their workers make while they start.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks import set_up
from benchmarks.pictures import draw_pictures, write_captions
from configs.schema import RetrievalConfig
from data.annotations import load_annotations
from data.findings import cores
from data.images import open_store
from data.loaders import eval_image_loader, recipe_sampler, train_loader
from training.dry_run import hardware
from transform.image import eval_transform, train_transform

BATCH = 16
AHEAD = 2  # batches that a worker makes before one is asked for: torch's prefetch_factor


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the loading of images.")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="*", help="default: 2 to 16, up to twice the cores")
    args = parser.parse_args(argv)
    if args.images < 2 * BATCH:
        parser.error(f"--images must be at least {2 * BATCH}")
    if args.workers is None:
        args.workers = [number for number in (2, 4, 8, 16) if number <= 2 * cores()]
    return args


def stage_seconds(load: Callable[[str], Image.Image], names: list[str], transforms: Sequence) -> dict[str, float]:
    """Seconds of each stage for all the images."""
    seconds = dict.fromkeys(["decode", *(type(transform).__name__ for transform in transforms)], 0.0)
    for name in names:
        start = time.perf_counter()
        x = load(name)
        for stage, transform in zip(seconds, [None, *transforms], strict=True):
            x = transform(x) if transform else x
            end = time.perf_counter()
            seconds[stage] += end - start
            start = end
    return seconds


def table(title: str, seconds: dict[str, float], count: int) -> list[str]:
    total = sum(seconds.values())
    rows = [f"| {stage} | {1e3 * s / count:.2f} | {100 * s / total:.0f} % |" for stage, s in seconds.items()]
    head = [f"| {title} | ms an image | share |", "|---|---|---|"]
    return [*head, *rows, f"| **all**, {count / total:.0f} images/s a core | {1e3 * total / count:.2f} | |"]


def images_per_second(loader: torch.utils.data.DataLoader) -> float:
    """Of the batches behind those that the workers have made while they all started."""
    count, start = 0, 0.0
    for number, batch in enumerate(loader):
        if start:
            count += len(batch if isinstance(batch, torch.Tensor) else batch.image)
        elif number + 1 >= AHEAD * loader.num_workers:
            start = time.perf_counter()
    return count / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = set_up(argparse.Namespace(threads=1, device="cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = draw_pictures(folder, args.images)
        samples = max([args.images, *(4 * AHEAD * workers * BATCH for workers in args.workers)])
        write_captions(folder / "train.json", names, samples)
        cfg = RetrievalConfig(
            "custom", image_root=name, ann_root=name,
            train_file="train.json", val_file="train.json", test_file="train.json",
            image_size=args.image_size, batch_size_train=BATCH, batch_size_test=BATCH, global_batch_size=BATCH,
            ranks_emulated=1,
        )  # fmt: skip
        load, lines = open_store(cfg).load, []
        for title, transform in (("training", train_transform), ("evaluation", eval_transform)):
            transforms = transform(args.image_size).transforms
            stage_seconds(load, names[:8], transforms)  # warms up
            lines += [*table(title, stage_seconds(load, names, transforms), len(names)), ""]
        lines += ["| workers | training, images/s | evaluation, images/s |", "|---|---|---|"]
        for workers in args.workers:
            some = RetrievalConfig(**{**vars(cfg), "num_workers": workers})
            train, test = load_annotations(some, "train"), load_annotations(some, "test")
            sampler = recipe_sampler(some, train, 0)
            gallery = [i % len(names) for i in range(samples)]
            both = train_loader(some, train, sampler, device), eval_image_loader(some, test, gallery, device)
            lines.append(f"| {workers} | " + " | ".join(f"{images_per_second(loader):.0f}" for loader in both) + " |")
    lines += ["", f"`python -m benchmarks.bench_loader {shlex.join(sys.argv[1:])}`", hardware(device)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
