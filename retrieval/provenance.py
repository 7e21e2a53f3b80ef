"""Where numbers come from: the columns of a result's row beside its Recall, and the first lines of a log."""

import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoints.weights import TWINS, weights_sha256
from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.rows import row_files
from data.tars import known_index, open_index
from models.blip_retrieval import BLIP_Retrieval
from utils import code_version, get_world_size

log = logging.getLogger("blip")


class Origin(NamedTuple):
    """Where weights come from: a path, address or name ('' = nowhere but this run), and in words what that is."""

    checkpoint: str = ""
    kind: str = "this run"


RANDOM = Origin("", "random weights")


class Provenance:
    """Builds rows: plain columns, the same for every row of a kind, which say how to get the numbers again."""

    def __init__(self, cfg: RetrievalConfig, splits: Mapping[str, Annotations], seed: int, device: torch.device):
        self.cfg, self.splits, self.seed, self.device = cfg, splits, seed, device
        self._hashes: dict[str, str] = {}

    def row(
        self, kind: str, numbers: dict[str, Any], model: nn.Module, evaluated: Iterable[str], origin: Origin
    ) -> dict[str, Any]:
        """One row of log.txt or evaluate.txt; `evaluated`: splits. A row with numbers of training names their data."""
        evaluated = list(evaluated)
        trained = ["train"] if any(key.startswith("train_") for key in numbers) else []
        return {
            "kind": kind,
            **rounded(numbers),
            "split": ",".join(evaluated),
            "checkpoint": origin.checkpoint,
            "checkpoint_kind": origin.kind,
            "checkpoint_sha256": weights_sha256(model),
            "dataset": self.cfg.dataset,
            **{key: value for split in trained + evaluated for key, value in self._data(split).items()},
            "seed": self.seed,
            "precision": self.cfg.precision,
            "eval_precision": self.cfg.eval_precision,
            "device": device_name(self.device),
            "processes": get_world_size(),
            "code": code_version(),
            "torch": torch.__version__,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _data(self, split: str) -> dict[str, Any]:
        table = self.splits[split]
        if table.source not in self._hashes:
            self._hashes[table.source] = files_sha256(table.files)
        return {
            f"{split}_file": table.source,
            f"{split}_file_sha256": self._hashes[table.source],
            f"{split}_images": len(table.images),
            f"{split}_captions": len(table.captions),
        }


def files_sha256(sources: Sequence[Path]) -> str:
    """The SHA-256 of one annotation file; of several, or of a folder, that of their hashes, a line each.

    A shard counts by its texts and the names and sizes of its pictures.
    """
    files = [file for source in sources for file in row_files(source)]
    hashes = []
    for path in files:
        if path.suffix.lower() == ".tar":
            index = open_index(path)[0] if path.exists() else known_index(path)  # None: not there
            hashes.append(index.digest().hex() if index else "")
            continue
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def rounded(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Recall in percent to 4 decimals, other fractions (losses, learning rates) to 6 significant digits."""
    return {key: _rounded(key, value) if isinstance(value, float) else value for key, value in numbers.items()}


def _rounded(key: str, value: float) -> float:
    return round(value, 4) if key.startswith(("val_", "test_")) else float(f"{value:.6g}")


# ---- the first lines of a log ---------------------------------------------------------------------------------------


def log_head(model: BLIP_Retrieval, cfg: RetrievalConfig) -> None:
    """Say what runs, where, and how large the model is."""
    device, processes = model.temp.device, get_world_size()
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {_version('transformers')}"
    count = f"{processes} process{'es' * (processes > 1)}, {threads} CPU thread{'s' * (threads > 1)} each"
    sizes = {name: p.numel() / 1e6 for name, p in model.named_parameters()}
    online = sum(size for name, size in sizes.items() if not name.startswith(TWINS))
    log.info("%s: %s", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"), shlex.join(sys.argv))
    log.info("code %s; %s", code_version(), versions)
    log.info("%s with %.1f GB; %s", device_name(device), device_memory(device) / 1e9, count)
    log.info(
        "ViT-%s with patches of %d on images of %d x %d pixels; %.1f M parameters, %.1f M with momentum twins",
        *(cfg.vit, cfg.patch_size, cfg.image_size, cfg.image_size, online, sum(sizes.values())),
    )
    log.info("tokenizer: %s", model.tokenizer)
    log.info("precision %s, eval_precision %s", cfg.precision, cfg.eval_precision)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def device_name(device: torch.device) -> str:
    """As its maker calls it: 'NVIDIA H100 80GB HBM3', 'AMD EPYC (CPU)'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} ({device.type.upper()})"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or one on another architecture
        return platform.processor() or platform.machine() or "unknown"


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
