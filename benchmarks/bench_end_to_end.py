"""A whole `--evaluate`, from JPEG files to Recall, against the published algorithm on the same files and weights.

    python -m benchmarks.bench_end_to_end --threads 2                      # hours: 1,000 images and 5,000 captions
    python -m benchmarks.bench_end_to_end --threads 2 --vit small --image_size 224 --med_config configs/med_small.json

Ours is `train_retrieval.py --evaluate` on random weights, as it is. The published way decodes with the same loader,
encodes image after block and captions padded to 35, and ranks query by query; it is timed on some images and queries
and extrapolated to all. Of those queries the scores of the ten best candidates are compared with the kept ranking.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_retrieval
from benchmarks import set_up
from benchmarks.pictures import draw_pictures, write_captions
from benchmarks.published import pad_to_35, pair_scores
from configs.schema import RetrievalConfig, save_config
from data.annotations import Annotations, load_annotations
from data.loaders import eval_image_loader
from models.blip_retrieval import BLIP_Retrieval, as_match_input, build_model
from training.dry_run import hardware
from transform.text import tokenize
from utils import format_seconds, precision

SEED = 42


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a whole evaluation against the published algorithm.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--precision", default="auto", help="eval_precision of ours; published computes in float32")
    parser.add_argument("--vit", default="base")
    parser.add_argument("--med_config", default="configs/med_config.json")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--gallery", type=int, nargs=2, default=(1000, 5000), metavar=("N", "M"))
    parser.add_argument("--k", type=int, default=128, help="k_test")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--queries", type=int, default=2, help="of each direction, that the published way is timed on")
    return parser.parse_args(argv)


def config(args: argparse.Namespace, folder: Path) -> RetrievalConfig:
    """A gallery of drawn pictures, and the file of the config."""
    names = draw_pictures(folder / "images", args.gallery[0])
    write_captions(folder / "test.json", names, args.gallery[1])
    cfg = RetrievalConfig(
        "custom", image_root=str(folder / "images"), ann_root=str(folder), test_file="test.json", vit=args.vit,
        med_config=args.med_config, image_size=args.image_size, k_test=args.k, num_workers=args.workers,
        eval_precision=args.precision, queue_size=64,
    )  # fmt: skip
    save_config(cfg, folder / "config.yaml")
    return cfg


def ours(folder: Path, args: argparse.Namespace) -> float:
    """Seconds of the program."""
    argv = ["--config", folder / "config.yaml", "--output_dir", folder / "out", "--device", args.device]
    start = time.perf_counter()
    status = train_retrieval.main([*map(str, argv), "--seed", str(SEED), "--evaluate", "--random_weights"])
    assert status == 0
    return time.perf_counter() - start


@torch.inference_mode()
def published(
    model: BLIP_Retrieval, cfg: RetrievalConfig, table: Annotations, device: torch.device, queries: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Seconds by stage, extrapolated, and the scores of the first images' and captions' shortlists.

    The shortlists come from all features, which are computed here without being timed.
    """
    texts = pad_to_35(tokenize(table.captions)).to(device)
    count, seconds, tokens, feats = len(table.images), {}, [], []
    start = time.perf_counter()
    for pixels in eval_image_loader(cfg, table, range(count), device):
        encoded = model.encode_image(pixels.to(device))
        tokens.append(encoded.cpu())
        feats.append(model.image_feature(encoded))
    image_feat = torch.cat(feats)
    seconds["decode and encode images"] = time.perf_counter() - start
    start, parts = time.perf_counter(), []
    for ids, mask in zip(*(x.split(256) for x in texts), strict=True):
        parts.append(model.text_feature(model.text_encoder(type(texts)(ids, mask))))
    text_feat = torch.cat(parts)
    seconds["encode captions"] = time.perf_counter() - start
    all_tokens, match = torch.cat(tokens), as_match_input(texts)
    sims, scores = image_feat @ text_feat.T, []
    for name, rows, total in (("image to text", sims, count), ("text to image", sims.T, len(table.captions))):
        start = time.perf_counter()
        for query, row in enumerate(rows[:queries]):
            value, top = row.topk(min(cfg.k_test, len(row)))
            image, text = (torch.full_like(top, query), top) if rows is sims else (top, torch.full_like(top, query))
            seen = all_tokens[image.cpu()].to(device)
            scores.append((value + pair_scores(model, seen, match, text)).cpu())
        seconds[name] = (time.perf_counter() - start) / queries * total
    return seconds, scores


def largest_difference(path: Path, scores: list[Tensor], queries: int) -> float:
    """Of the ten best scores of each query, between the kept ranking and the published way."""
    kept = np.load(path)
    best = [*kept["txt_itm_score"][:queries], *kept["img_itm_score"][:queries]]
    tens = [x.topk(min(10, len(x))).values.numpy() for x in scores]
    return max(float(np.abs(a[: len(b)] - b).max()) for a, b in zip(best, tens, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = config(args, folder)
        own = ours(folder, args)
        torch.manual_seed(SEED)
        model = build_model(cfg).to(device).eval()
        table = load_annotations(cfg, "test")
        with precision(model, "fp32"):  # as on a CPU: on a GPU, convolutions would take TF32 by themselves
            stages, scores = published(model, cfg, table, device, args.queries)
        apart = largest_difference(folder / "out" / "ranking_test.npz", scores, args.queries)
    theirs = sum(stages.values())
    lines = ["| evaluation | time | seconds |", "|---|---|---|"]
    lines += [f"| published: {stage} | {format_seconds(s)} | {s:.1f} |" for stage, s in stages.items()]
    lines += [f"| published | {format_seconds(theirs)} | {theirs:.1f} |"]
    lines += [f"| **this repository**, {theirs / own:.1f} times faster | {format_seconds(own)} | {own:.1f} |", ""]
    lines += [
        f"`python -m benchmarks.bench_end_to_end {shlex.join(sys.argv[1:] if argv is None else argv)}`",
        f"{hardware(device)}, torch {torch.__version__}; ViT-{args.vit} at {args.image_size} px, "
        f"{args.gallery[0]} images, {args.gallery[1]} captions, k_test {args.k}",
        f"largest difference between the ten best scores of {2 * args.queries} queries: {apart:.1e}",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
