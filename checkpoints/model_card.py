"""The README.md of an exported folder: what was trained on what, how well it retrieves, and what it is not for.

Source of the sections: Mitchell et al. 2019 (Model Cards, arXiv 1810.03993). What nobody has written down is said to be
unknown; the owner of the weights fills it in.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.weights import Sizes, WeightFile
from transform.text import blip_tokenizer

CARD = "README.md"
RECALL = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
FOR_TRANSFORMERS = (
    "For BlipForImageTextRetrieval and BlipProcessor of transformers. To match, put id {enc}, [ENC], first in place of "
    "[CLS]; give captions in lower case without punctuation, as they were trained on."
)
LIMITS = """\
- It reads {language}. Other languages, and captions beyond {max_words} words or {max_tokens} tokens, it does not.
- Recall is measured against the captions that were written for an image. Other captions and images that fit as well
  count as wrong, so Recall is too low; it says nothing about other kinds of pictures or captions.
- If it, or the weights that it started from, learnt from pictures and texts of the web, it repeats their biases about
  people, places and professions. Do not use it to decide about people.
- A score orders candidates of one query. It is no probability that a caption is true, and counting, negation and who
  does what to whom are often missed.
"""


def model_card(file: WeightFile, sizes: Sizes, sha256: str, graphs: str = "", library: str = "") -> str:
    """Markdown with the front matter of Hugging Face.

    `graphs`: what the folder holds, if not transformers' model, and `library`: what reads it.
    """
    trained: dict[str, Any] = file.extra.get("config", {})
    tokenizer = file.tokenizer
    own = f"the language of its vocabulary of {len(tokenizer.words)} word pieces (fill in which)"
    language = "English" if tokenizer.reads_as(blip_tokenizer()) else own
    limits = LIMITS.format(language=language, max_words=tokenizer.max_words, max_tokens=tokenizer.max_tokens)
    return "\n".join(
        [
            "---",
            "license: other  # of the weights: fill in, see below",
            "pipeline_tag: zero-shot-image-classification" if not graphs else f"library_name: {library}",
            "tags: [image-text-retrieval, blip]",
            "---",
            "",
            "# BLIP for image-text retrieval",
            "",
            f"ViT-{sizes.vit} at {sizes.image_size} px, {sizes.text['num_hidden_layers']} text layers, embeddings of "
            f"{sizes.embed_dim} numbers. {graphs or FOR_TRANSFORMERS.format(enc=tokenizer.enc)}",
            f"Written from `{Path(file.name).name}`, SHA-256 of the weights `{sha256[:16]}`.",
            "",
            "## What it was trained on",
            "",
            *_training(file, trained),
            "",
            "## Recall, in percent",
            "",
            *_recall(Path(file.name), sha256),
            "",
            "## Limits",
            "",
            limits,
            "## Licence",
            "",
            "The program that wrote this is BSD-3-Clause, as BLIP. The weights inherit the terms of what they were "
            "trained on and started from: fill in yours.",
            "",
            "## Source",
            "",
            "Li et al., BLIP, ICML 2022, arXiv 2201.12086.",
            "",
        ]
    )


def _training(file: WeightFile, trained: dict[str, Any]) -> list[str]:
    if not trained.get("dataset"):
        return ["Unknown: the file does not say. Fill in the data set and where training started."]
    files = ", ".join(str(trained[key]) for key in ("train_file",) if trained.get(key))
    sources = [trained[key] for key in ("pretrained", "image_tower", "text_tower") if trained.get(key)]
    start = " and ".join(Path(source).name for source in sources) or "random weights"
    keys = ("init_lr", "warmup_steps", "random_negative_steps", "layer_decay", "freeze", "lora", "global_batch_size",
            "max_epoch", "momentum", "queue_size", "precision", "seed")  # fmt: skip
    settings = ", ".join(f"{key} {trained[key]}" for key in keys if trained.get(key) is not None)
    epoch = file.extra.get("epoch")
    return [
        f"Data set `{trained['dataset']}`{f' ({files})' if files else ''}, from {start}"
        f"{f'; weights of epoch {epoch}, counted from 0' if epoch is not None else ''}.",
        f"Settings: {settings}. Code: {file.extra.get('code', 'unknown')}.",
    ]


def _recall(checkpoint: Path, sha256: str) -> list[str]:
    """Rows of log.txt and evaluate.txt beside the checkpoint that are of these weights."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in ("log.txt", "evaluate.txt"):
        for row in _rows(folder / name):
            if row.get("checkpoint_sha256") == sha256:
                found |= {(row.get("dataset", ""), split): row for split in ("val", "test") if f"{split}_txt_r1" in row}
    if not found:
        return ["Not measured, or not with these very weights. `train_retrieval.py --evaluate` measures it."]
    table = [
        "| split | images, captions | image to text R@1, 5, 10 | text to image R@1, 5, 10 |",
        "|---|---|---|---|",
    ]
    for (data, split), row in sorted(found.items()):
        numbers = [f"{row[f'{split}_{key}']:.1f}" for key in RECALL]
        counts = f"{row.get(f'{split}_images', '?')}, {row.get(f'{split}_captions', '?')}"
        table.append(f"| {data} {split} | {counts} | {' '.join(numbers[:3])} | {' '.join(numbers[3:])} |")
        if all(f"{split}_chance_{key}" in row for key in RECALL):
            chance = [f"{row[f'{split}_chance_{key}']:.3g}" for key in RECALL]
            table.append(f"| by chance | | {' '.join(chance[:3])} | {' '.join(chance[3:])} |")
    return table


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; none of a file that is none, and no half-written ones."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows
