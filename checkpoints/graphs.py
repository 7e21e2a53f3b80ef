"""A folder for programs without this repository: a model's graphs (ONNX or torch.export), and how to prepare inputs.

image, text, match   .onnx or .pt2, one file each; `models/exported.py` says what goes in and comes out
preprocess.json      size, mean, std, cleaning of captions, threshold of P(match), which weights these are
tokenizer.json       of the `tokenizers` package, which cuts and pads; vocab.txt has the same pieces, one a line
use.py, rgb.py       a consumer of few lines, and pictures of any mode to RGB
README.md            the model card

Every graph is read back and compared with the model, at other sizes than it was traced with.
"""

import importlib.util
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim

from checkpoints.files import new_folder
from checkpoints.model_card import CARD
from transform.rgb import PixelRule
from transform.text import CLEANING, MAX_TOKENS, CaptionTokenizer
from utils import Progress, code_version

log = logging.getLogger(__name__)

SUFFIX = {"onnx": ".onnx", "export2": ".pt2"}
NEEDED = ("onnx", "onnxscript", "onnxruntime")
ABSENT = "ONNX needs {}, which is not installed: pip install -r requirements-export.txt"
TRACED = (2, 8)  # batch and text length; neither 1, which torch would take for a constant
VERIFIED = ((1, 2), (3, MAX_TOKENS))
TOLERANCE = 1e-4  # of float32, relative to the largest value


class Part(nn.Module):
    """One graph: a module that holds what it computes with, and no more."""

    name: str
    inputs: dict[str, tuple[str, ...]]  # the axes of each that are free, from the first
    outputs: tuple[str, ...]
    longest = MAX_TOKENS  # text length

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        raise NotImplementedError

    @staticmethod
    def expected(model: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The model's own outputs."""
        raise NotImplementedError


def require_packages(kind: str) -> None:
    """ValueError with what to install."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None] if kind == "onnx" else []
    if absent:
        raise ValueError(ABSENT.format(", ".join(absent)))


def write_graphs(
    folder: Path,
    kind: str,
    parts: Sequence[Callable[[], Part]],
    model: nn.Module,
    preprocess: dict[str, Any],
    tokenizer: CaptionTokenizer,
    card: str,
    exact: bool,
) -> list[str]:
    """Write and verify a new `folder`, all of it or nothing; lines that say how near the graphs are to the model.

    Parts are made when their turn comes, so that one copy of an encoder is in memory at a time. ValueError when a graph
    computes something else: more than TOLERANCE if `exact`, or values that are not finite.
    """
    lines: list[str] = []
    differences: dict[str, float] = {}
    progress = Progress(f"export to {folder.name}", len(parts), "graphs")
    with new_folder(folder) as made:
        for make in parts:
            part = make()
            start, path = time.monotonic(), made / f"{part.name}{SUFFIX[kind]}"
            log.info("%s: tracing, writing, comparing", path.name)
            WRITERS[kind](part.eval().requires_grad_(False), path)
            found = compare(RUNNERS[kind](path), part, model, exact)
            seconds, size = time.monotonic() - start, path.stat().st_size / 1e6
            lines.append(f"{path.name}: {size:.1f} MB, {seconds:.0f} s, largest difference {_in_words(found)}")
            differences |= {f"{part.name}.{output}": difference for output, (difference, _) in found.items()}
            progress.add(1)
        write_vocabulary(made, tokenizer)
        (made / CARD).write_text(card, encoding="utf-8")
        text = json.dumps(preprocess | {"largest_difference": differences}, indent=2) + "\n"
        (made / "preprocess.json").write_text(text, encoding="utf-8")
        for name in ("checkpoints/use.py", "transform/rgb.py"):
            shutil.copyfile(Path(__file__).parent.parent / name, made / Path(name).name)
    return lines


def preparation(
    image_size: int,
    rule: PixelRule,
    colours: tuple[Sequence[float], Sequence[float]],
    tokenizer: CaptionTokenizer,
    threshold: float | None,
    source: dict[str, str],
) -> dict[str, Any]:
    """What preprocess.json says."""
    mean, std = colours
    return {
        "format": 1,
        "image": {"size": image_size, "resample": "bicubic", "mean": mean, "std": std, "rgb": rule._asdict()},
        "text": {
            "lower": tokenizer.lower_case,
            "replace": [(old.pattern, new) for old, new in CLEANING],
            "max_words": tokenizer.max_words,
            "max_tokens": tokenizer.max_tokens,
        },
        "threshold": threshold,
        "source": source | {"code": code_version()},
    }


def write_vocabulary(folder: Path, tokenizer: CaptionTokenizer) -> None:
    """tokenizer.json and vocab.txt of the checkpoint's tokenizer."""
    fast = Tokenizer.from_str(tokenizer.bert.backend_tokenizer.to_str())  # a copy
    fast.enable_truncation(tokenizer.max_tokens)
    fast.enable_padding()
    fast.save(str(folder / "tokenizer.json"))
    pieces = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")


# ---- formats --------------------------------------------------------------------------------------------------------


def _traced(part: Part) -> tuple[torch.export.ExportedProgram, tuple[dict[int, Any], ...]]:
    dims = {"batch": Dim("batch"), "length": Dim("length", min=2, max=part.longest)}
    shapes = tuple({axis: dims[name] for axis, name in enumerate(axes)} for axes in part.inputs.values())
    return torch.export.export(part, part.example(*TRACED), dynamic_shapes=shapes), shapes


def _write_onnx(part: Part, path: Path) -> None:
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every node
    program, shapes = _traced(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one batch size has one name
        torch.onnx.export(
            program, (), path, input_names=list(part.inputs), output_names=part.outputs, dynamic_shapes=shapes,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


def _write_pt2(part: Part, path: Path) -> None:
    program, _ = _traced(part)
    try:
        torch.export.save(program, path)
    except RuntimeError as error:  # torch's file writer
        raise OSError(f"{path.name} could not be written ({error})") from error


def _run_onnx(path: Path) -> Callable[..., list[np.ndarray]]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def _run_pt2(path: Path) -> Callable[..., list[np.ndarray]]:
    program = torch.export.load(path).module()
    return lambda *inputs: [x.numpy() for x in program(*inputs)]


WRITERS = {"onnx": _write_onnx, "export2": _write_pt2}
RUNNERS = {"onnx": _run_onnx, "export2": _run_pt2}


# ---- verification ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    run: Callable[..., Sequence[np.ndarray]], part: Part, model: nn.Module, exact: bool
) -> dict[str, tuple[float, float]]:
    """Of each output, the largest difference from the model's at the sizes VERIFIED, and the largest value."""
    found = dict.fromkeys(part.outputs, (0.0, 0.0))
    for batch, length in VERIFIED:
        inputs = part.example(batch, min(length, part.longest))
        wanted = part.expected(model, *inputs)
        for name, got, want in zip(part.outputs, run(*inputs), wanted, strict=True):
            if not np.isfinite(got).all():
                raise ValueError(f"{part.name}: {name} has values that are not finite: use --precision bf16 or fp32.")
            if got.shape != want.shape:
                raise ValueError(f"{part.name}: {name} is {got.shape}, the model's {tuple(want.shape)}.{REMEDY}")
            difference, largest = float(np.abs(got - want.numpy()).max()), float(want.abs().max())
            found[name] = max(found[name][0], difference), max(found[name][1], largest)
            if exact and difference > TOLERANCE * largest:
                raise ValueError(
                    f"{part.name}: {name} differs from the model's by {difference:.2g} (values up to {largest:.2g}) "
                    f"with {batch} inputs.{REMEDY}"
                )
    return found


REMEDY = " Nothing was written. Try the versions in constraints.txt."


def _in_words(found: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {difference:.1e} (values up to {top:.2g})" for name, (difference, top) in found.items())
