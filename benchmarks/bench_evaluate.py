"""Re-ranking a COCO-sized gallery on random weights: the published algorithm, transformers and this repository.

    python -m benchmarks.bench_evaluate --device cuda --precision bf16   # a whole COCO 5K split
    python -m benchmarks.bench_evaluate --device cpu --threads 2         # the same shapes, on a few images

Shortlists come from planted features whose pairs per image spread as a real model's do (those of random weights are
degenerate), captions have COCO's lengths. The slow ways are timed on a small complete gallery, both directions, and
extrapolated by the number of pairs; so is this repository where `--images` is less than the gallery. That gallery also
proves in the same run that scores and Recall are equal. Favours to the slow ways: image tokens stay on the device
(published: copied from the host for every query), and transformers pads to the longest text of a query, not to 35.
The times do not include encoding, which is printed beside the table. `ours` times shortlists, scores and the recheck
when it scores all images, as `train_retrieval.py` does; of some images it times their pairs alone.

Shapes: N images and M texts of the gallery, k shortlist, B images and C texts of the small gallery, P pairs of a call.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import set_up
from benchmarks.rerank_ways import STEPS, restructurings, slow_ways
from models.blip_retrieval import BLIP_Retrieval
from retrieval.metrics import retrieval_metrics
from retrieval.rerank import encode_images, encode_texts, needed_pairs, own_blocks, rerank_encoded, shortlist
from retrieval.scoring import EncodedImages, EncodedTexts, score_pairs
from training.dry_run import hardware, synthetic_captions
from transform.text import MAX_TOKENS, TokenizedText
from utils import memory_mb, precision

LATENT, NOISE, HUBNESS = 32, 1.1, 0.4  # of the planted features: 383 to 2855 pairs per image at COCO's size
BATCH = 64  # images encoded at once
SLOW = {"published": "published algorithm", "transformers": "transformers, image tokens cached"}
POOL = 512  # texts that some images' pairs are drawn from: only lengths matter to the time


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and compare three ways to re-rank a gallery.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--vit", default="base")
    parser.add_argument("--med_config", default="configs/med_config.json")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--gallery", type=int, nargs=2, default=(5000, 25010), metavar=("N", "M"))
    parser.add_argument("--k", type=int, default=256, help="shortlist of a query")
    parser.add_argument("--images", type=int, help="images that are really scored; default: all on cuda, 1 on a CPU")
    parser.add_argument("--small", type=int, nargs=2, metavar=("B", "C"), help="small gallery for the slow ways")
    parser.add_argument("--ablation_pairs", type=int, help="pairs of one image that each restructuring is timed on")
    parser.add_argument("--rerank_tokens", type=int, default=32768, help="text tokens of a pass")
    parser.add_argument(
        "--exact", action="store_true", help="also rank all images in fp32 and compare Recall (minutes)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="rounds over everything; the median counts")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.images = args.images or (args.gallery[0] if cuda else 1)
    args.small = args.small or ((32, 256) if cuda else (4, 8))
    args.ablation_pairs = args.ablation_pairs or (1024 if cuda else 128)
    return args


# ---- inputs -------------------------------------------------------------------------------------------------------


class Gallery(NamedTuple):
    image_feat: Tensor  # (N, LATENT)
    text_feat: Tensor  # (M, LATENT)
    image_ids: np.ndarray
    text_ids: np.ndarray
    text: TokenizedText  # (M, 35)


def plant_gallery(num_images: int, num_texts: int, vocab_size: int) -> Gallery:
    """Features in which texts lie around their image and some images are near to all texts; random words."""
    rng = np.random.default_rng(0)
    owner = np.arange(num_texts) * num_images // num_texts
    latent = rng.standard_normal((num_images, LATENT))
    common = HUBNESS * rng.standard_normal(LATENT)
    around = latent[owner] + NOISE * rng.standard_normal((num_texts, LATENT))
    feats = (F.normalize(torch.from_numpy(x + common).float(), dim=1) for x in (latent, around))
    text = synthetic_captions(num_texts, vocab_size)
    return Gallery(*feats, np.arange(num_images), owner, text)


def first_rows(text: TokenizedText, count: int, device: str = "cpu") -> TokenizedText:
    return TokenizedText(*(x[:count].to(device) for x in text))


def random_images(count: int, model: BLIP_Retrieval, size: int) -> EncodedImages:
    """Random pictures through the image encoder."""
    blocks = own_blocks(count, BATCH)
    pixels = (torch.randn(len(block), 3, size, size, device=model.temp.device) for block in blocks)
    return encode_images(model, pixels, count, BATCH)


# ---- timing -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    seconds: float
    megabytes: float
    result: object


def measure(work: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, Measured]:
    """Rounds over all the work, so that a slow spell of the machine meets everything; median seconds."""
    cuda = device.type == "cuda"
    runs: dict[str, list[Measured]] = {name: [] for name in work}
    for turn in range(-1 if cuda else 0, repeats):  # turn -1 warms up
        for name, function in work.items():
            if turn < 0 and name == "ours":
                continue
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            result = function()
            if cuda:
                torch.cuda.synchronize(device)
            if turn >= 0:
                runs[name].append(Measured(time.perf_counter() - start, memory_mb(device), result))
    return {n: runs_[-1]._replace(seconds=statistics.median(r.seconds for r in runs_)) for n, runs_ in runs.items()}


class Inputs(NamedTuple):
    """What is scored: encoded images and texts, and for the pairs of a split (P,) their image and caption."""

    images: EncodedImages
    texts: EncodedTexts
    pair_image: np.ndarray
    pair_text: np.ndarray


def build_inputs(model: BLIP_Retrieval, gallery: Gallery, args: argparse.Namespace) -> Inputs:
    """Shortlists of the whole gallery; tokens of its images, and states of its texts, or of as many as are timed."""
    everyone = np.arange(args.gallery[1])
    pairs = needed_pairs(shortlist(gallery.image_feat, gallery.text_feat, everyone, args.k), everyone)
    pool = max(POOL, args.small[1], args.ablation_pairs) if args.images < args.gallery[0] else len(everyone)
    start = time.perf_counter()
    texts = encode_texts(model, first_rows(gallery.text, pool), args.rerank_tokens)
    texts.feat.cpu()  # waits
    middle = time.perf_counter()
    images = random_images(max(args.images, args.small[0]), model, args.image_size)
    images.feat.cpu()
    end = time.perf_counter()
    rates = len(texts.lengths) / (middle - start), len(images.feat) / (end - middle)
    print("encoded {:.0f} texts/s and {:.1f} images/s\n".format(*rates))
    return Inputs(images, texts, pairs.image, pairs.text)


def rerank_gallery(model: BLIP_Retrieval, gallery: Gallery, inputs: Inputs, args: argparse.Namespace):
    """The whole gallery as `train_retrieval.py` ranks it, but for the planted features."""
    device, order = model.temp.device, torch.from_numpy(inputs.texts.distinct)
    text_feat = torch.empty_like(gallery.text_feat).index_copy_(0, order, gallery.text_feat)
    images = replace(inputs.images, feat=gallery.image_feat.to(device))
    texts = replace(inputs.texts, feat=text_feat.to(device))
    return rerank_encoded(model, images, texts, args.k, args.rerank_tokens, (gallery.image_ids, gallery.text_ids)).itm


def our_work(model: BLIP_Retrieval, gallery: Gallery, inputs: Inputs, args: argparse.Namespace) -> tuple[Callable, int]:
    """What is timed as ours, and its number of pairs: of images that stand for the spread of pairs per image."""
    if args.images >= args.gallery[0]:
        return lambda: rerank_gallery(model, gallery, inputs, args), len(inputs.pair_image)
    per_image = np.bincount(inputs.pair_image, minlength=args.gallery[0])
    chosen = np.argsort(per_image)[((np.arange(args.images) + 0.5) / args.images * args.gallery[0]).astype(int)]
    image = np.repeat(np.arange(args.images), per_image[chosen])
    text = np.concatenate([inputs.pair_text[inputs.pair_image == i] for i in chosen])
    text = inputs.texts.distinct[text % len(inputs.texts.distinct)]
    return lambda: score_pairs(model, inputs.images, inputs.texts, image, text, args.rerank_tokens), len(image)


# ---- comparison ---------------------------------------------------------------------------------------------------


class SmallGallery(NamedTuple):
    """B images, C texts dealt to them in turn, and their cosines (B, C)."""

    images: EncodedImages
    texts: EncodedTexts
    ids: tuple[np.ndarray, np.ndarray]
    cosine: np.ndarray


def small_gallery(model: BLIP_Retrieval, images: EncodedImages, text: TokenizedText, size: Sequence[int]):
    """The first B images and C texts."""
    num_images, num_texts = size
    blocks = images.tokens[: -(-num_images // BATCH)]
    tokens = torch.cat([block.to(model.temp.device) for block in blocks])[:num_images]
    few = EncodedImages(images.feat[:num_images], [range(num_images)], [tokens])
    texts = encode_texts(model, first_rows(text, num_texts), num_texts * MAX_TOKENS)
    cosine = few.feat @ texts.feat[torch.from_numpy(texts.distinct).to(few.feat.device)].T
    return SmallGallery(few, texts, (np.arange(num_images), np.arange(num_texts) % num_images), cosine.cpu().numpy())


def small_matrices(
    small: SmallGallery, measured: dict, ranking, exact: Sequence[Tensor]
) -> dict[str, list[np.ndarray]]:
    """Score matrices (B, C) and (C, B) of every way; `exact`: the published way's logits in float32."""
    both = small.cosine, small.cosine.T
    logits = {name: [measured[f"{name} {way}"].result for way in ("i2t", "t2i")] for name in SLOW} | {"float32": exact}
    matrices = {name: [x.cpu().numpy() + c for x, c in zip(v, both, strict=True)] for name, v in logits.items()}
    ours = [np.empty(cosine.shape, cosine.dtype) for cosine in both]
    np.put_along_axis(ours[0], ranking.i2t.astype(np.int64), ranking.i2t_value, axis=1)
    np.put_along_axis(ours[1], ranking.t2i.astype(np.int64), ranking.t2i_value, axis=1)
    return matrices | {"this repository": ours}


def comparison(matrices: dict[str, list[np.ndarray]], ids: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """A line for each way: largest score difference to the published way in float32, and whether Recall is the same."""

    def recall(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
        dense = (np.broadcast_to(np.arange(x.shape[1]), x.shape) for x in (i2t, t2i))
        return retrieval_metrics(next(dense), i2t, next(dense), t2i, *ids)

    exact = matrices.pop("float32")
    expected, lines = recall(*exact), []
    for name, both in matrices.items():
        difference = max(np.abs(a - b).max() for a, b in zip(both, exact, strict=True))
        got = recall(*both)
        lines.append(
            f"{name}: largest score difference to the published way in float32 {difference:.1e}, "
            f"Recall {'equal' if got == expected else 'DIFFERENT'} "
            f"(txt_r1 {got['txt_r1']:.2f}, img_r1 {got['img_r1']:.2f}, r_mean {got['r_mean']:.2f})"
        )
    return lines


def full_comparison(model: BLIP_Retrieval, gallery: Gallery, inputs: Inputs, args: argparse.Namespace, ours) -> str:
    """Recall of the whole gallery beside float32's."""
    with precision(model, "fp32"):
        exact = rerank_gallery(model, gallery, inputs, args)
    ids = gallery.image_ids, gallery.text_ids
    got, expected = (retrieval_metrics(x.i2t, x.i2t_value, x.t2i, x.t2i_value, *ids) for x in (ours, exact))
    same = "equal" if got == expected else f"DIFFERENT from {expected}"
    return f"Recall of the whole gallery is {same} to float32's: {got}"


# ---- report -------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def table_rows(measured: dict[str, Measured], args: argparse.Namespace, union: int, our_pairs: int) -> list[tuple]:
    """(words, pairs of a split, seconds of a split, peak MB) of every way."""
    (num_images, num_texts), small = args.gallery, args.small[0] * args.small[1]
    i2t, t2i = num_images * min(args.k, num_texts), num_texts * min(args.k, num_images)
    rows = []
    for name, words in SLOW.items():
        both = [measured[f"{name} {way}"] for way in ("i2t", "t2i")]
        seconds = (i2t * both[0].seconds + t2i * both[1].seconds) / small
        rows.append((words, i2t + t2i, seconds, max(x.megabytes for x in both)))
    words = {
        "an image's keys and values once": ("keys and values once", i2t + t2i),
        "no padding": ("no padding", i2t + t2i),
        "union of both directions": ("no padding", union),
        "last layer for [ENC] alone": ("[ENC] alone", union),
        "layer 0 once per text": ("layer 0 once", union),
    }
    for text, (step, pairs) in words.items():
        rows.append(
            (f"+ {text}", pairs, pairs * measured[step].seconds / args.ablation_pairs, measured[step].megabytes)
        )
    ours = measured["ours"]
    who = f"**this repository**, {our_pairs:,} pairs of {min(args.images, num_images):,} image(s)"
    return [*rows, (who, union, union * ours.seconds / our_pairs, ours.megabytes)]


def markdown(rows: list[tuple], args: argparse.Namespace) -> list[str]:
    """Time per pair and per split, and how many times faster than the first two rows."""
    cuda = args.device != "cpu"
    titles = [args.precision, "ms per pair", "pairs", "one split", "x published", "x transformers"] + ["peak MB"] * cuda
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for words, pairs, seconds, megabytes in rows:
        cells = [words, f"{1e3 * seconds / pairs:.3g}", f"{pairs:,}", duration(seconds)]
        cells += [f"{rows[i][2] / seconds:.1f}" for i in (0, 1)] + [f"{megabytes:,.0f}"] * cuda
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def setting(args: argparse.Namespace, device: torch.device, pair_image: np.ndarray) -> list[str]:
    """Command, machine and shapes."""
    per_image = np.bincount(pair_image, minlength=args.gallery[0])
    return [
        f"`python -m benchmarks.bench_evaluate {shlex.join(sys.argv[1:])}`",
        f"{hardware(device)}, torch {torch.__version__}; ViT-{args.vit} at {args.image_size} px",
        f"pairs per image {per_image.min()} to {per_image.max()}, mean {per_image.mean():.0f}; "
        f"peak host memory {memory_mb(torch.device('cpu')):,.0f} MB",
    ]


class Outcome(NamedTuple):
    """Rows of the table, what they were measured on, and what is said of scores and Recall."""

    rows: list[tuple]
    pair_image: np.ndarray
    lines: list[str]


def compare(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Time every way, and compare scores and Recall."""
    model = BLIP_Retrieval(args.med_config, args.image_size, args.vit, queue_size=64).to(device).eval()
    gallery = plant_gallery(*args.gallery, model.text_encoder.config.vocab_size)
    with torch.inference_mode():
        with precision(model, "tf32" if args.precision == "tf32" else "fp32"):  # the encoders', as in `rerank`
            inputs = build_inputs(model, gallery, args)
            small = small_gallery(model, inputs.images, gallery.text, args.small)
        slow = slow_ways(model, small.images.tokens[0], first_rows(gallery.text, args.small[1], device))
        few = first_rows(gallery.text, args.ablation_pairs, device)
        steps = restructurings(model, inputs.images, inputs.texts, few, args.rerank_tokens)
        ours, our_pairs = our_work(model, gallery, inputs, args)
        with precision(model, args.precision):
            measured = measure({**slow, **steps, "ours": ours}, device, args.repeats)
            ranking = rerank_encoded(model, *small[:2], max(args.small), args.rerank_tokens, small.ids).itm
        with precision(model, "fp32"):
            exact = [slow[f"published {way}"]() for way in ("i2t", "t2i")] if args.precision != "fp32" else [
                measured[f"published {way}"].result for way in ("i2t", "t2i")
            ]  # fmt: skip
        lines = comparison(small_matrices(small, measured, ranking, exact), small.ids)
        if args.exact and args.images >= args.gallery[0]:
            lines.append(full_comparison(model, gallery, inputs, args, measured["ours"].result))
    results = [measured[name].result.cpu() for name in STEPS]
    lines.append(
        f"largest difference between restructurings: {max((x - results[-1]).abs().max() for x in results):.1e}"
    )
    return Outcome(table_rows(measured, args, len(inputs.pair_image), our_pairs), inputs.pair_image, lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    rows, pair_image, lines = compare(args, device)
    print("\n".join([*markdown(rows, args), "", *setting(args, device, pair_image), *lines]))


if __name__ == "__main__":
    main()
