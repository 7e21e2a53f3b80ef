"""Checkpoints from the command line: say what a file holds, convert to and from Hugging Face, export graphs.

python -m checkpoints inspect FILE                                what a file or folder of any format holds
python -m checkpoints export CHECKPOINT FOLDER [--config YAML]    to a BlipForImageTextRetrieval folder
python -m checkpoints import FOLDER CHECKPOINT                    from one
python -m checkpoints onnx CHECKPOINT FOLDER [--precision fp16]   graphs for onnxruntime, with a consumer without torch
python -m checkpoints export2 CHECKPOINT FOLDER                   the same graphs for torch.export (.pt2)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.files import few, require_new
from checkpoints.graphs import SUFFIX, require_packages
from checkpoints.huggingface import read_folder, write_folder
from checkpoints.load import LoadReport, fit, open_weights
from checkpoints.model_card import model_card
from checkpoints.runs import write_atomically
from checkpoints.weights import QUEUES, TWINS, online_name, read_sizes, state_sha256, weights_sha256
from models.loading import empty_model, file_sizes, load
from utils import setup_logging


def export_folder(source: str, folder: Path, config: str = "") -> LoadReport:
    """Write any readable checkpoint as a new Hugging Face folder; `config` gives image_size and med_config."""
    require_new(folder)
    file = open_weights(source)
    sizes, med = file_sizes(file, config)
    target = empty_model(sizes, med).state_dict()
    state, report = fit(file, target)
    ordered = {key: state[key] for key in target if key in state}
    write_folder(folder, state, med, file.name, file.extra, state_sha256(ordered))
    return report


def import_folder(folder: Path, path: Path) -> LoadReport:
    """Write a Hugging Face folder as a new checkpoint in the official layout; the twins are the online weights."""
    require_new(path)
    file = read_folder(folder)
    sizes, med = file_sizes(file)
    model = empty_model(sizes, med)
    state, report = fit(file, model.state_dict())
    for key in report.seeded:
        state[key] = state[online_name(key)]  # shared memory is stored once
    config = {"vit": sizes.vit, **{key: getattr(sizes, key) for key in ("image_size", "patch_size", "embed_dim")}}
    path.parent.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {key: file.extra[key] for key in ("text_config", "tokenizer") if key in file.extra}
    write_atomically({"model": state, "config": config | file.extra.get("config", {}), **said}, path)
    return report


def export_graphs(kind: str, source: str, folder: Path, config: str = "", precision: str = "fp32") -> list[str]:
    """Write image, text and match as `kind` (onnx, export2) to a new folder; lines about sizes and differences."""
    require_packages(kind)
    require_new(folder)
    from models.exported import export
    from retrieval.threshold import kept_threshold

    blip = load(source, config=config)
    sha256 = weights_sha256(blip.model)
    file = open_weights(source)
    words = f"Graphs for {'onnxruntime' if kind == 'onnx' else 'torch.export'}, {precision}; use.py shows their use."
    library = "onnx" if kind == "onnx" else "pytorch"
    card = model_card(file, read_sizes(file.state, file.name, blip.model.vit), sha256, words, library)
    return export(blip, kind, folder, precision, kept_threshold(source, sha256), source, card)


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
    lines.append(f"tokenizer: {file.tokenizer}")
    if file.ignored:
        lines.append(f"ignored: {len(file.ignored)} tensors: {few(file.ignored, 3)}")
    lines += [
        f"{key}: {file.extra[key]}" for key in ("epoch", "run", "world_size", "code", "config") if key in file.extra
    ]
    if "optimizer" in file.extra:
        lines.append("optimizer state: yes")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints", description="Inspect and convert checkpoints.")
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
    for kind, what in (("onnx", "ONNX"), ("export2", "torch.export (.pt2)")):
        graphs = commands.add_parser(kind, help=f"write image, text and match as {what}, and a consumer")
        graphs.add_argument("source", metavar="CHECKPOINT")
        graphs.add_argument("folder", metavar="FOLDER", type=Path)
        graphs.add_argument("--config", default="", metavar="YAML", help="gives image_size and med_config")
        graphs.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"), help="of the encoders")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        if args.command == "inspect":
            print("\n".join(describe(args.source)))
        elif args.command == "export":
            print(f"{args.folder}: {export_folder(args.source, args.folder, args.config)}")
        elif args.command in SUFFIX:
            lines = export_graphs(args.command, args.source, args.folder, args.config, args.precision)
            print("\n".join([f"{args.folder}: {args.command}, {args.precision}", *lines]))
        else:
            print(f"{args.path}: {import_folder(args.folder, args.path)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
