"""Recall of an export on the test split of `scenes`, by its own consumer: run it where torch is not installed.

    PYTHONPATH=. python benchmarks/recall_without_torch.py exported data_cache/scenes [--k 32] [--keep scores.npz]

Shortlists by cosine, re-ranked by matching logit + cosine, as evaluation does. Prints one JSON line; `--keep`
writes the shortlists and scores. By path, not with -m: the package `benchmarks` imports torch.

Shapes: N images, M captions, k shortlist.
"""

import argparse
import io
import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from retrieval.metrics import retrieval_metrics


def rank(blip, pictures: list, captions: list[str], k: int) -> dict[str, np.ndarray]:
    """i2t (N, k), t2i (M, k) and their scores, by cosine (itc) and re-ranked (itm)."""
    parts = [blip.images(pictures[start : start + 32]) for start in range(0, len(pictures), 32)]
    tokens, feature = (np.concatenate(part) for part in zip(*parts, strict=True))
    cosine = feature @ np.concatenate([blip.texts(captions[i : i + 64]) for i in range(0, len(captions), 64)]).T
    i2t, t2i = (np.argsort(-x, 1, kind="stable")[:, :k] for x in (cosine, cosine.T))  # (N, k), (M, k)
    found = {"i2t": i2t, "t2i": t2i, "i2t_itc": np.take_along_axis(cosine, i2t, 1)}
    found["t2i_itc"] = np.take_along_axis(cosine.T, t2i, 1)
    logits = [blip.match([captions[j] for j in row], tokens[[i] * len(row)])[:, 1] for i, row in enumerate(i2t)]
    found["i2t_itm"] = np.stack(logits) + found["i2t_itc"]
    logits = [blip.match([captions[j]] * len(row), tokens[row])[:, 1] for j, row in enumerate(t2i)]
    found["t2i_itm"] = np.stack(logits) + found["t2i_itc"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall of an export on the test split of scenes")
    parser.add_argument("folder", type=Path, help="of python -m checkpoints onnx or export2")
    parser.add_argument("scenes", type=Path, help="of python -m data.scenes")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.folder))
    from use import Exported  # type: ignore[import-not-found]

    rows = json.loads((args.scenes / "test.json").read_text(encoding="utf-8"))
    captions = [caption for row in rows for caption in row["caption"]]
    image_ids = np.arange(len(rows))
    text_ids = np.repeat(image_ids, [len(row["caption"]) for row in rows])
    start = time.monotonic()
    with zipfile.ZipFile(args.scenes / "images.zip") as archive:
        found = rank(Exported(), [io.BytesIO(archive.read(row["image"])) for row in rows], captions, args.k)
    kinds = {"": "itm", "itc_": "itc"}
    numbers = {
        f"{prefix}{key}": round(value, 4)
        for prefix, kind in kinds.items()
        for key, value in retrieval_metrics(
            found["i2t"], found[f"i2t_{kind}"], found["t2i"], found[f"t2i_{kind}"], image_ids, text_ids
        ).items()
    }
    print(json.dumps(numbers | {"seconds": round(time.monotonic() - start), "torch": "torch" in sys.modules}))
    if args.keep:
        np.savez(args.keep, **found)


if __name__ == "__main__":
    main()
