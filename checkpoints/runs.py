"""Saves of a training run: one atomic file each, and exact continuation.

A save holds the official layout (`model`, `optimizer`, `config`, `epoch`) and `text_config`, `tokenizer`, `run`,
`world_size`, and `code`, the version that wrote it. It needs no state of random generators: training derives every
draw from (seed, step, rank), and the sampler's place is `run.step`. What a crash can cost: the steps since the last
save. A file gets its name when it is whole and on disk.
"""

import logging
import os
import re
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints.files import DamagedFile, few, read_pth
from checkpoints.protocol import RetrievalModel
from checkpoints.weights import merge_lora, require_equal_tokenizers, tokenizer_in
from configs.schema import RENAMED, RetrievalConfig
from utils import code_version, get_world_size, is_main

log = logging.getLogger(__name__)

# Another value would continue another experiment; every other key may change.
FIXED_KEYS = (
    "dataset", "vit", "patch_size", "image_size", "embed_dim", "queue_size", "global_batch_size", "ranks_emulated",
    "freeze", "layer_decay", "lora",
)  # fmt: skip
# Of `text_config`: dropout may change, sizes may not.
FREE_TEXT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
# What a key that a save does not have, as it is newer, stands for.
DEFAULTS = {knob.name: knob.default for knob in fields(RetrievalConfig) if knob.default is not MISSING}
NAME = re.compile(r"checkpoint_e(\d+)_s(\d+)\.pth")
BEST = "checkpoint_best.pth"  # weights of the epoch with the best validation r_mean
PART = ".part"  # of a save that was interrupted


@dataclass
class RunState:
    """Where training stands, in plain numbers; `step` is the next one within `epoch`.

    An epoch whose steps are all done is still to be validated; `epoch` becomes the next one afterwards.
    """

    epoch: int = 0
    step: int = 0
    best: float = 0.0
    best_epoch: int = -1
    origin: str = ""  # what training started from, in words
    momentum_moved: bool = False  # the next step was begun and left: its twins have moved
    meters: dict[str, Any] = field(default_factory=dict)


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path, model: RetrievalModel, optimizer: Optimizer, config: dict[str, Any], epoch: int, **extra: Any
) -> None:
    """Write the official layout and `extra` atomically; on rank 0 only. Only a save for `resume` keeps A and B apart.

    OSError when the disk is full or fails: a former file of that name is still there then.
    """
    text_config, code = asdict(model.text_encoder.config), code_version()
    plain = {"config": config, "epoch": epoch, "text_config": text_config, "code": code, **extra}
    plain["tokenizer"] = model.tokenizer.to_plain()
    _require_plain(plain)
    if is_main():
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = model.state_dict() if "run" in extra else merge_lora(model.state_dict())
        write_atomically({"model": state, "optimizer": optimizer.state_dict(), **plain}, path)


def size_of_save(model: nn.Module) -> int:
    """Bytes: weights, twins and queues, each once where they are shared, and AdamW's two averages of what trains."""
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return state + 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def write_atomically(data: dict[str, Any], path: Path) -> None:
    """torch.save to a name beside `path`, to the disk, then rename."""
    part = path.with_name(path.name + PART)
    try:
        torch.save(data, part)
        _sync(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's file writer
        raise OSError(f"{path} could not be saved ({error}); the files saved before it are untouched.") from error
    finally:
        part.unlink(missing_ok=True)
    with suppress(PermissionError):  # Windows opens no folders
        _sync(path.parent, os.O_RDONLY)  # the new name too survives a power cut


def _sync(path: Path, flags: int = os.O_RDWR) -> None:  # Windows syncs no file open for reading only
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_plain(value: Any, where: str = "checkpoint") -> None:
    """TypeError for any other object: it could not be read back, as loading refuses pickled objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_plain(item, f"{where}[{i}]")
    elif type(value) not in (str, int, float, bool, type(None)) and not isinstance(value, Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only.")


def save_run(
    folder: str | Path,
    model: RetrievalModel,
    optimizer: Optimizer,
    config: dict[str, Any],
    state: RunState,
    keep_last: int,
) -> Path:
    """Save for `resume`; then, and only then, delete saves older than the `keep_last` newest."""
    folder = Path(folder)
    path = folder / f"checkpoint_e{state.epoch:03d}_s{state.step:06d}.pth"
    save_checkpoint(path, model, optimizer, config, state.epoch, run=asdict(state), world_size=get_world_size())
    if is_main():
        for leftover in folder.glob(f"checkpoint_e*.pth{PART}"):
            leftover.unlink()
        runs = find_runs(folder)
        place = runs.index(path)
        for later in runs[:place]:  # damaged, or left behind when an earlier save was resumed
            log.warning("%s is ahead of this run: kept as %s.aside", later, later.name)
            later.rename(later.with_name(later.name + ".aside"))
        for older in runs[place + max(1, keep_last) :]:
            older.unlink()
    return path


def epoch_of_best(folder: Path) -> int | str:
    """The epoch whose weights `checkpoint_best.pth` holds, or words that say why there are none."""
    path = folder / BEST
    try:
        return int(read_pth(path)["epoch"]) if path.exists() else "missing"
    except (ValueError, KeyError, TypeError):
        return "not readable"


# ---- resuming -------------------------------------------------------------------------------------------------------


def find_runs(folder: str | Path) -> list[Path]:
    """Saves for `resume`, newest (epoch, step) first."""
    found = [(NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint_*.pth")]
    return [path for _, path in sorted(((int(m[1]), int(m[2])), path) for m, path in found if m)[::-1]]


def resume(
    source: str, folder: str | Path, model: RetrievalModel, optimizer: Optimizer, config: dict[str, Any]
) -> RunState | None:
    """Continue from the file `source`, or under 'auto' from the newest readable save in `folder`; None if it has none.

    `config` is the resolved one. ValueError when it would continue another experiment, or no save is readable.
    """
    if source != "auto":
        return load_run(Path(source), model, optimizer, config)
    runs = find_runs(folder)
    for path in runs:
        try:
            return load_run(path, model, optimizer, config)
        except DamagedFile as error:
            _warn(f"{error} Falling back to the save before it.")
    if runs:
        raise ValueError(f"{folder}: none of {len(runs)} saves can be read. To start anew, remove them: {few(runs)}.")
    return None


def load_run(path: Path, model: RetrievalModel, optimizer: Optimizer, config: dict[str, Any]) -> RunState:
    """Restore weights, twins, queues and optimizer; ValueError, with nothing restored, unless everything fits.

    Learning rates come back as saved; an optimizer's other options are those of the current config.
    """
    path = Path(path)
    data = read_pth(path, check_sums=True)
    lacking = [key for key in ("model", "optimizer", "config", "run") if not isinstance(data.get(key), dict)]
    if lacking:
        raise ValueError(
            f"{path}: is not the save of a run, it lacks {', '.join(lacking)}. To start from its weights, name it as "
            "`pretrained`."
        )
    _require_same_experiment(path, data, config, asdict(model.text_encoder.config))
    if tokenizer := tokenizer_in(data):
        require_equal_tokenizers(str(path), tokenizer, model.tokenizer)
    _require_fit(path, data, model, optimizer)
    model.load_state_dict(data["model"])
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(data["optimizer"])
    for group, current in zip(optimizer.param_groups, options, strict=True):
        group.update(current)
    _detach_from_file(optimizer)
    state = RunState(**data["run"])
    log.info("resumed %s: epoch %d, step %d, best %.2f", path, state.epoch, state.step, state.best)
    return state


def _require_same_experiment(path: Path, data: dict[str, Any], config: dict[str, Any], med: dict[str, Any]) -> None:
    """ValueError naming every fixed key that differs; other differences are logged, and training goes on."""
    named = {RENAMED.get(key, key): value for key, value in data["config"].items()}
    saved = DEFAULTS | named | {f"med_config's {key}": value for key, value in data.get("text_config", {}).items()}
    current = config | {f"med_config's {key}": value for key, value in med.items()}
    fixed = {*FIXED_KEYS, *(f"med_config's {key}" for key in med if key not in FREE_TEXT_KEYS)}
    changed = {
        key: f"{key} is {current.get(key, 'unset')!r}, was {saved.get(key, 'unset')!r}"
        for key in current | saved
        if key not in current or key not in saved or current[key] != saved[key]
    }
    breaking = [text for key, text in changed.items() if key in fixed and key in saved]
    if breaking:
        raise ValueError(
            f"{path}: the config now describes another experiment: {', '.join(breaking)}. Restore that, or start in "
            "a new --output_dir."
        )
    for key, text in changed.items():
        hint = ": from here on the learning rate follows the cosine over the new number" if key == "max_epoch" else ""
        _warn(f"resuming with a changed config: {text}{hint}")
    if data.get("world_size", get_world_size()) != get_world_size():
        log.info(
            "%d processes have saved this run, %d resume it: ranks_emulated and global_batch_size are the same",
            data["world_size"], get_world_size(),
        )  # fmt: skip


def _require_fit(path: Path, data: dict[str, Any], model: RetrievalModel, optimizer: Optimizer) -> None:
    """Everything `load_run` is about to write has the shape it will be written to."""
    target = {key: value.shape for key, value in model.state_dict().items()}
    saved = {key: value.shape for key, value in data["model"].items()}
    wrong = [key for key in target | saved if target.get(key) != saved.get(key)]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the model: {few(wrong)}. Restore the run's config.")
    if not _optimizer_fits(data["optimizer"], optimizer):
        raise ValueError(f"{path}: its optimizer does not fit the current one. Resume with the version that saved it.")


def _optimizer_fits(saved: dict[str, Any], optimizer: Optimizer) -> bool:
    """Same groups, and averages of the parameters' shapes: torch does not compare these."""
    groups, current = saved.get("param_groups", []), optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in current]:
        return False
    index = [i for group in groups for i in group["params"]]
    params = [p for group in current for p in group["params"]]
    return all(
        value.shape == p.shape
        for i, p in zip(index, params, strict=True)
        for key, value in saved.get("state", {}).get(i, {}).items()
        if key.startswith("exp_avg")
    )


def _detach_from_file(optimizer: Optimizer) -> None:
    """On the CPU the optimizer took the file's own mapped memory: copy it, so that the file is free."""
    for moments in optimizer.state.values():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                moments[key] = value.clone()


def _warn(message: str) -> None:
    log.log(logging.WARNING if is_main() else logging.DEBUG, message)
