"""Searching an index: time a query, of re-ranking, and of making the index.

    python -m benchmarks.bench_search [--sizes 10000 100000 1000000] [--threads 2] [--vit base --image_size 384]

Queries run over random unit vectors in the files of an index, beside a plain numpy sort in float64 and faiss's flat
index (when it is installed) in the same process; all three must find the same. Re-ranking and indexing use random
weights of the given size and random pictures, stored as JPEG.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.sizes import MedConfig
from models.blip_retrieval import BLIP_Retrieval
from models.loading import Blip
from retrieval.index import Entry, Head, IndexFolder, PartWriter
from retrieval.indexing import update_index
from retrieval.search import LocalStore, Searcher

WIDTH, TOP = 256, 10


def milliseconds(do: Callable[[], object], repeats: int) -> float:
    """The median of some calls, after one that warms up."""
    do()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def bench_vectors(count: int, repeats: int = 7) -> list[str]:
    """A row of the table: ms a query of this program, of a plain sort, and of faiss."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        index = IndexFolder.create(Path(folder, "i"), Head("", "", folder, WIDTH, (1, 1)))
        writer = PartWriter(index.folder)
        for start in range(0, count, 50_000):
            part = rng.standard_normal((min(50_000, count - start), WIDTH)).astype(np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            writer.append(torch.from_numpy(part), None, [])
        writer.close()
        entries = [Entry(b"", 0, 0, b"", writer.name, row) for row in range(count)]
        store, vectors = LocalStore(index, entries), index.vectors(writer.name)
        query = rng.standard_normal((1, WIDTH)).astype(np.float32)
        query /= np.linalg.norm(query)

        def plain() -> list[int]:
            return np.argsort(-(vectors.astype(np.float64) @ query[0].astype(np.float64)), kind="stable")[:TOP].tolist()

        found = [number for number, _ in store.nearest(query, TOP)[0]]
        assert found == plain(), "not the hits of a plain sort"
        row = [f"{count:,}", milliseconds(lambda: store.nearest(query, TOP), repeats), milliseconds(plain, 3)]
        try:
            import faiss
        except ModuleNotFoundError:
            return [row[0], *(f"{value:.1f}" for value in row[1:]), "not installed"]
        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(np.ascontiguousarray(vectors))
        assert flat.search(query, TOP)[1][0].tolist() == found, "not the hits of faiss"
        row.append(milliseconds(lambda: flat.search(query, TOP), repeats))
        index.close()
    return [str(row[0]), *(f"{value:.1f}" for value in row[1:])]


def bench_model(vit: str, size: int, images: int, rerank: int) -> list[str]:
    """Lines: images/s of indexing, and ms of a query whose candidates are encoded again, or come from the cache."""
    torch.manual_seed(0)
    model = BLIP_Retrieval(MedConfig(), image_size=size, vit=vit, queue_size=8).eval().requires_grad_(False)
    blip, rng = Blip(model), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures")
        root.mkdir()
        for number in range(images):
            coarse = rng.integers(0, 256, (15, 20, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(root / f"{number}.jpg")
        tokens = (model.visual_encoder.pos_embed.shape[1], model.visual_encoder.width)
        index = IndexFolder.create(Path(folder, "i"), Head("", "", str(root), WIDTH, tokens))
        start = time.perf_counter()
        update_index(index, blip)
        rate = images / (time.perf_counter() - start)
        searcher = Searcher(index, blip)
        start = time.perf_counter()
        searcher.texts(["a dog in the snow"], TOP, rerank)
        first = time.perf_counter() - start
        again = milliseconds(lambda: searcher.texts(["a cat on a table"], TOP, rerank), 3) / 1000
        contrast = milliseconds(lambda: searcher.texts(["a cat on a table"], TOP, 0), 3)
        index.close()
    return [
        f"- ViT-{vit} at {size} px: indexing {rate:.2f} images/s; a query by contrast {contrast:.0f} ms; with {rerank} "
        f"candidates re-ranked {first:.1f} s when they are encoded again, {again:.1f} s from the cache"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_search")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vit", default="base")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rerank", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.sizes:
        print("| vectors | this program, ms | numpy sort in float64, ms | faiss flat, ms |\n|---|---|---|---|")
    for count in args.sizes:
        print(f"| {' | '.join(bench_vectors(count))} |", flush=True)
    if args.images:
        print("\n".join(bench_model(args.vit, args.image_size, args.images, args.rerank)), flush=True)


if __name__ == "__main__":
    main()
