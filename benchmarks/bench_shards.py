"""What loader workers copy of many captions, and the time of pictures out of shards, a folder and a .zip.

    python -m benchmarks.bench_shards [--captions 10000000] [--pictures 20000]

Memory: captions as a list of texts, as it was before, and as `data.texts.Texts`, in a process of their own each. Forked
workers then read every caption in random order; what the kernel had to copy for a worker is its private memory.
"""

import argparse
import gc
import io
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import ImageStore
from data.rows import read_rows
from data.shards import _open
from data.texts import Texts

WORDS = "a man woman dog cat in the on with of red blue street table sitting standing riding large small two".split()
MEGA = 1e6


def private_mb() -> float:
    """Memory of this process that no other one shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MEGA


def captions(count: int):
    """Ten words each, about 45 letters."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 100_000):
        for row in rng.integers(0, len(WORDS), (min(100_000, count - start), 10)):
            yield " ".join(WORDS[i] for i in row)


def work(texts: Sequence[str], number: int, queue) -> None:
    """A worker: reads each caption once, in an order of its own; reports what it had to copy, and its rate."""
    before = private_mb()
    order, letters, start = np.random.default_rng(number).permutation(len(texts)), 0, time.perf_counter()
    own = order.nbytes / MEGA
    for index in order:
        letters += len(texts[index])
    queue.put((private_mb() - before - own, len(texts) / (time.perf_counter() - start), letters))


def hold(kind: Callable, count: int, workers: int, answer) -> None:
    """A loader's parent: makes the captions, forks workers one after the other, reports each one's memory."""
    before = private_mb()
    texts = kind(captions(count))
    gc.collect()
    held, context = private_mb() - before, get_context("fork")
    queue = context.Queue()
    found = []
    for number in range(workers):
        worker = context.Process(target=work, args=(texts, number, queue))
        worker.start()
        found.append(queue.get())
        worker.join()
    answer.put((held, found))


def bench_memory(count: int, workers: int) -> list[str]:
    rows, letters = [], set()
    for name, kind in (("list", list), ("one buffer", Texts)):
        answer = get_context("spawn").Queue()
        process = get_context("spawn").Process(target=hold, args=(kind, count, workers, answer))
        process.start()
        held, found = answer.get()
        process.join()
        letters |= {each[2] for each in found}
        copied, rate = max(each[0] for each in found), min(each[1] for each in found)
        rows.append(f"| {name} | {held:,.0f} | {copied:,.0f} | {1e6 / rate:.2f} |")
    assert len(letters) == 1, "not the same captions"
    return rows


def bench_pictures(count: int) -> list[str]:
    """Lines: microseconds to read a picture's bytes in random order, and to make and open the index."""
    rng, lines = np.random.default_rng(0), []
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    file = io.BytesIO()
    coarse.resize((340, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    picture = file.getvalue()
    with tempfile.TemporaryDirectory() as place:
        root, members = Path(place), 0
        (root / "folder").mkdir()
        (root / "shards").mkdir()
        names = [f"{i:08d}.jpg" for i in range(count)]
        with zipfile.ZipFile(root / "all.zip", "w") as archive:
            for shard in range(0, count, 10_000):
                with tarfile.open(root / "shards" / f"{shard // 10_000:05d}.tar", "w") as tar:
                    for name in names[shard : shard + 10_000]:
                        (root / "folder" / name).write_bytes(picture)
                        archive.writestr(name, picture)
                        for ending, data in ((".jpg", picture), (".txt", b"a caption"), (".json", b'{"width": 340}')):
                            info = tarfile.TarInfo(name.removesuffix(".jpg") + ending)
                            info.size = len(data)
                            tar.addfile(info, io.BytesIO(data))
                            members += 1
        start = time.perf_counter()
        ImageStore(root / "shards")
        lines.append(f"- making the index: {1e6 * (time.perf_counter() - start) / members:.0f} us a member")
        _open.cache_clear()
        start = time.perf_counter()
        ImageStore(root / "shards")
        lines.append(f"- opening it: {1e6 * (time.perf_counter() - start) / members:.2f} us a member")
        start = time.perf_counter()
        read_rows(root / "shards", root / "shards")
        lines.append(f"- captions out of the shards: {1e6 * (time.perf_counter() - start) / count:.0f} us a sample")
        order = rng.permutation(count)
        for kind in ("folder", "all.zip", "shards"):
            store = ImageStore(root / kind)
            start = time.perf_counter()
            for index in order:
                with store.open_file(names[index]) as opened:
                    assert len(opened.read()) == len(picture)
            lines.append(f"- bytes of a picture, {kind}: {1e6 * (time.perf_counter() - start) / count:.0f} us")
        start = time.perf_counter()
        for index in order[:500]:
            store.load(names[index])
        lines.append(f"- a decoded picture of 340 x 256, shards: {1e6 * (time.perf_counter() - start) / 500:.0f} us")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_shards")
    parser.add_argument("--captions", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=20_000)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    print("| captions | held by the parent, MB | copied by a worker, MB | us a caption |\n|---|---|---|---|")
    print("\n".join(bench_memory(args.captions, args.workers)), flush=True)
    print("\n".join(bench_pictures(args.pictures)), flush=True)


if __name__ == "__main__":
    main()
