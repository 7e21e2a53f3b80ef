"""Exports of random weights in the published sizes: files, seconds, differences, and time of each graph.

    python -m benchmarks.bench_export --vit large --image_size 384 --kind onnx [--precision fp16]

Times are the best of two, of onnxruntime or the loaded program, and of the model here under the same threads.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import set_up
from checkpoints.__main__ import export_graphs
from checkpoints.graphs import RUNNERS, SUFFIX
from checkpoints.weights import QUEUES, TWINS
from models import load
from models.blip_retrieval import BLIP_Retrieval
from models.exported import ImagePart, MatchPart, TextPart
from utils import memory_mb

PARTS = (ImagePart, TextPart, MatchPart)


def write_random(path: Path, vit: str, image_size: int) -> None:
    """A checkpoint of the published text encoder and this image encoder, without twins and queues."""
    model = BLIP_Retrieval(image_size=image_size, vit=vit, queue_size=8)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(TWINS) and k not in QUEUES}
    torch.save({"model": state, "text_config": asdict(model.text_encoder.config)}, path)


def best_of(compute: Callable[[], object], repeats: int = 2) -> float:
    """Milliseconds, after one call that does not count."""
    compute()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="exports of random weights")
    parser.add_argument("--vit", default="base")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--kind", default="onnx", choices=SUFFIX)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    args = parser.parse_args()
    device = set_up(args)
    with tempfile.TemporaryDirectory() as work:
        path, folder = Path(work, "random.pth"), Path(work, "exported")
        write_random(path, args.vit, args.image_size)
        start = time.perf_counter()
        with torch.inference_mode(False):
            lines = export_graphs(args.kind, str(path), folder, precision=args.precision)
        print(f"ViT-{args.vit}, {args.image_size} px, {args.kind}, {args.precision}")
        print(*lines, sep="\n", flush=True)
        print(
            f"in all {time.perf_counter() - start:.0f} s, peak of host memory {memory_mb(device) / 1000:.1f} GB",
            flush=True,
        )
        model = load(path).model
        for kind in PARTS:
            part = kind(model, torch.float32, False).eval()
            inputs = part.example(args.batch, 12)
            run = RUNNERS[args.kind](folder / f"{part.name}{SUFFIX[args.kind]}")
            there = best_of(partial(run, *inputs))
            here = best_of(partial(part.expected, model, *inputs))
            print(f"{part.name}, batch {args.batch}: {there:.0f} ms, the model here {here:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
