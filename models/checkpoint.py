"""Checkpoints: load what is published, save and resume runs, convert to and from Hugging Face.

    python -m models.checkpoint inspect FILE                                what a file or folder holds
    python -m models.checkpoint export CHECKPOINT FOLDER [--config YAML]    to a BlipForImageTextRetrieval folder
    python -m models.checkpoint import FOLDER CHECKPOINT                    from one

This file decides what may be missing from, and ignored in, foreign weights. What formats look like is known by
`weights.py` (.pth), `huggingface.py`, `runs.py` (saves of a run) and `download.py` (addresses).
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import load_config
from models.blip_retrieval import BLIP_Retrieval
from models.download import local_path
from models.huggingface import read_folder, write_folder
from models.med import MedConfig, load_med_config
from models.runs import RunState, find_runs, load_run, resume, save_checkpoint, save_run, write_atomically
from models.vit import VIT_SIZES
from models.weights import (
    POS_EMBEDS,
    QUEUES,
    TWINS,
    Sizes,
    WeightFile,
    few,
    read_sizes,
    read_weights,
    require_equal_sizes,
    resample_pos_embed,
)
from utils import find_path, setup_logging

__all__ = [
    "LoadReport", "RunState", "find_runs", "load_pretrained", "load_run", "resume", "save_checkpoint", "save_run",
]  # fmt: skip

log = logging.getLogger(__name__)

HEAD_WIDTH = 64  # of BERT and of every published BLIP text encoder


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors, by official name; `kind` says what the file is.

    loaded: as they are; resampled: loaded after resampling; seeded: momentum twins set to the online weights;
    ignored: in the file only; missing: queues, which stay as the model built them.
    """

    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    seeded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    kind: str = ""

    def __str__(self) -> str:
        counts = ("loaded", "resampled", "seeded", "ignored", "missing")
        return f"{self.kind}: {', '.join(f'{len(getattr(self, name))} {name}' for name in counts)}"


# ---- loading --------------------------------------------------------------------------------------------------------


def open_weights(source: str, cache_dir: str = "") -> WeightFile:
    """Weights from a `.pth`'s path, address or released name, or from a Hugging Face folder."""
    path = local_path(source, cache_dir)
    return read_folder(path) if path.is_dir() else read_weights(path)


def load_pretrained(model: BLIP_Retrieval, source: str, cache_dir: str = "") -> LoadReport:
    """Load foreign weights into the model: everything but the queues, and nothing silently.

    ValueError for a file that is damaged, of other sizes, or that lacks or adds anything else.
    """
    file = open_weights(source, cache_dir)
    _require_equal_heads(file, model.text_encoder.config)
    state, report = fit(file, model.state_dict())
    model.load_state_dict(state, strict=False)
    if report.seeded:
        model.copy_params()
    log.info("%s: %s", file.name, report)
    if report.resampled:
        log.info("%s: position embeddings resampled to %d image tokens", file.name, state[POS_EMBEDS[0]].shape[1])
    if report.seeded:
        log.info("%s: no momentum weights; the momentum twins start at the online weights", file.name)
    return report


def fit(file: WeightFile, target: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """The file's tensors in `target`'s shapes, and the report of doing so; ValueError unless they are a whole model."""
    require_equal_sizes(read_sizes(file.state, file.name), read_sizes(target, "the model"), file.name)
    state = {key: value for key, value in file.state.items() if key not in QUEUES}
    resampled = [key for key in POS_EMBEDS if key in state and state[key].shape[1] != target[key].shape[1]]
    for key in resampled:
        state[key] = resample_pos_embed(state[key], target[key].shape[1], f"{file.name}: {key}")
    has_twins = any(key.startswith(TWINS) for key in state)
    seeded = [] if has_twins else [key for key in target if key.startswith(TWINS)]
    queues = [key for key in target if key in QUEUES]

    missing = [key for key in target if key not in {*state, *seeded, *queues}]
    unexpected = [key for key in state if key not in target]
    other = [key for key in state if key in target and state[key].shape != target[key].shape]
    for what, keys in (("lacks", missing), ("also has", unexpected), ("has in another shape", other)):
        if keys:
            raise ValueError(
                f"{file.name}: does not fit the retrieval model, it {what} {len(keys)} tensors: {few(keys)}. Is it "
                "of another task (captioning, VQA) or of ALBEF? `python -m models.checkpoint inspect` says."
            )
    loaded = [key for key in state if key not in resampled]
    ignored = file.ignored + [key for key in file.state if key in QUEUES]
    return state, LoadReport(loaded, resampled, seeded, ignored, queues, file.kind)


def _require_equal_heads(file: WeightFile, med: MedConfig) -> None:
    """Heads leave no trace in shapes: a wrong number would load, and compute something else."""
    heads = file.extra.get("text_config", {}).get("num_attention_heads", med.num_attention_heads)
    if heads != med.num_attention_heads:
        raise ValueError(
            f"{file.name}: its text encoder has {heads} attention heads, the config's {med.num_attention_heads}: set "
            "num_attention_heads in the JSON that `med_config` names."
        )


# ---- conversion -----------------------------------------------------------------------------------------------------


def export_folder(source: str, folder: Path, config: str = "") -> LoadReport:
    """Write any readable checkpoint as a Hugging Face folder; `config` gives image_size and the text encoder's JSON."""
    file = open_weights(source)
    sizes = read_sizes(file.state, file.name)
    if config:
        cfg = load_config(config)
        med = load_med_config(find_path(cfg.med_config))
        _require_equal_heads(file, med)
        width, depth = VIT_SIZES[cfg.vit][:2]
        sizes = Sizes(width, depth, cfg.patch_size, cfg.image_size, cfg.embed_dim, sizes.text)
    else:
        med = text_config(file, sizes)
    state, report = fit(file, empty_model(sizes, med).state_dict())
    write_folder(folder, state, med, file.name)
    return report


def import_folder(folder: Path, path: Path) -> LoadReport:
    """Write a Hugging Face folder as a checkpoint in the official layout; the twins are the online weights."""
    file = read_folder(folder)
    sizes = read_sizes(file.state, file.name)
    model = empty_model(sizes, MedConfig(**file.extra["text_config"]))
    state, report = fit(file, model.state_dict())
    for key in report.seeded:
        state[key] = state[key.replace("_m.", ".", 1)]  # shared memory is stored once
    config = {"vit": sizes.vit, **{key: getattr(sizes, key) for key in ("image_size", "patch_size", "embed_dim")}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({"model": state, "config": config, "text_config": file.extra["text_config"]}, path)
    return report


def empty_model(sizes: Sizes, med: MedConfig) -> BLIP_Retrieval:
    """A model of names and shapes, without memory; the numbers of image heads come from VIT_SIZES."""
    if not sizes.vit:
        raise ValueError(f"{sizes.vit_words} has an unknown number of heads; known are {', '.join(VIT_SIZES)}.")
    with torch.device("meta"):
        return BLIP_Retrieval(
            med,
            image_size=sizes.image_size,
            vit=sizes.vit,
            embed_dim=sizes.embed_dim,
            patch_size=sizes.patch_size,
            queue_size=1,
        )


def text_config(file: WeightFile, sizes: Sizes) -> MedConfig:
    """The text encoder's config: the file's own, or what its shapes tell and HEAD_WIDTH."""
    if "text_config" in file.extra:
        return MedConfig(**file.extra["text_config"])
    hidden = sizes.text["hidden_size"]
    if hidden % HEAD_WIDTH:
        raise ValueError(
            f"{file.name}: does not say how many attention heads its text encoder ({hidden} wide) has: give --config, "
            "a YAML whose med_config does."
        )
    log.info("%s: does not say how many text attention heads it has; taking %d wide ones", file.name, HEAD_WIDTH)
    return MedConfig(num_attention_heads=hidden // HEAD_WIDTH, **sizes.text)


# ---- command line ---------------------------------------------------------------------------------------------------


def describe(source: str) -> list[str]:
    """Lines that say what a file or folder holds."""
    file = open_weights(source)
    sizes = read_sizes(file.state, file.name)
    med = file.extra.get("text_config", {})
    heads = med.get("num_attention_heads", "unknown")
    parts: dict[str, int] = {}
    for key, value in file.state.items():
        part = key.split(".")[0]
        parts[part] = parts.get(part, 0) + value.numel()
    online = sum(n for part, n in parts.items() if f"{part}." not in TWINS and part not in QUEUES)
    lines = [
        f"{file.name}: {file.kind}",
        f"image encoder: {sizes.vit_words}, patch {sizes.patch_size}, image size {sizes.image_size}",
        f"text encoder: {', '.join(f'{key} {value}' for key, value in sizes.text.items())}, heads {heads}",
        f"embed_dim {sizes.embed_dim}, temp {file.state['temp'].item():.4f}" if "temp" in file.state else "no temp",
        f"parameters: {online / 1e6:.1f} M without momentum twins and queues",
        *(f"    {part}: {count:,}" for part, count in parts.items()),
    ]
    if file.ignored:
        lines.append(f"ignored: {len(file.ignored)} tensors: {few(file.ignored, 3)}")
    lines += [f"{key}: {file.extra[key]}" for key in ("epoch", "run", "world_size", "config") if key in file.extra]
    if "optimizer" in file.extra:
        lines.append("optimizer state: yes")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m models.checkpoint", description="Inspect and convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a file or folder of any format holds")
    inspect.add_argument("source", metavar="FILE")
    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face BlipForImageTextRetrieval folder")
    export.add_argument("source", metavar="CHECKPOINT")
    export.add_argument("folder", metavar="FOLDER", type=Path)
    export.add_argument("--config", default="", metavar="YAML", help="gives image_size and med_config")
    importing = commands.add_parser("import", help="write a Hugging Face folder as a checkpoint")
    importing.add_argument("folder", metavar="FOLDER", type=Path)
    importing.add_argument("path", metavar="CHECKPOINT", type=Path)
    args = parser.parse_args(argv)
    setup_logging()
    try:
        if args.command == "inspect":
            print("\n".join(describe(args.source)))
        elif args.command == "export":
            print(f"{args.folder}: {export_folder(args.source, args.folder, args.config)}")
        else:
            print(f"{args.path}: {import_folder(args.folder, args.path)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
