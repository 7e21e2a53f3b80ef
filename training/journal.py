"""The files of a run's folder that tell its story, written by rank 0 line by line.

log.txt: one JSON row an evaluation; steps.jsonl: one every few steps; console.log: what the screen shows, with dates;
tensorboard/: the numbers of the first two, if asked for. When a run is resumed, rows that it writes again are dropped
before, so that the files are those of a run that was never interrupted.
"""

import json
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from checkpoints.runs import RunState
from configs.schema import RetrievalConfig
from retrieval.provenance import Origin, Provenance, rounded
from training.failures import explain
from training.preflight import LOG, Job
from utils import Stopped, is_main, record

STEPS, CONSOLE, TENSORBOARD = "steps.jsonl", "console.log", "tensorboard"


class Journal:
    """Entered, it keeps the lines of the log; after `open` it writes. On other ranks than 0 it does nothing."""

    def __init__(self, job: Job, device: torch.device):
        self.folder, self.cfg = job.folder, job.cfg
        self.provenance = Provenance(job.cfg, job.splits, job.args.seed, device)
        self.console = ConsoleLog()
        self.writer: Any = None  # of TensorBoard

    def __enter__(self) -> "Journal":
        if is_main():
            logging.getLogger().addHandler(self.console)
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is not None:
            self.console.handle(logging.makeLogRecord({"msg": last_words(error, self.cfg)}))
        logging.getLogger().removeHandler(self.console)
        self.console.close()
        if self.writer is not None:
            self.writer.close()

    def open(self, state: RunState | None, steps: int) -> None:
        """Go on from `state` (None: from the beginning) of a run with `steps` an epoch; makes the folder."""
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        epoch, done = (state.epoch, state.epoch * steps + state.step) if state else (-1, -1)
        rewind(self.folder / LOG, lambda row: row.get("epoch", epoch) < epoch)
        rewind(self.folder / STEPS, lambda row: row["step"] <= done)
        self.console.open(self.folder / CONSOLE)
        if self.cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds, and is no requirement

            self.writer = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=done + 1)

    def evaluated(
        self, kind: str, numbers: dict[str, Any], model: nn.Module, split: str, origin: Origin, step: int
    ) -> dict[str, Any]:
        """Write a row of log.txt, and return it; `step`: steps of the run so far."""
        row: dict[str, Any] = {}
        if is_main():
            row = self.provenance.row(kind, numbers, model, [split], origin)
            record(self.folder / LOG, row)
            self._plot({key: row[key] for key in numbers if key.startswith(f"{split}_")}, split, step)
        return row

    def step(self, step: int, epoch: int, numbers: dict[str, float]) -> None:
        """A row of steps.jsonl; `step`: steps of the run so far, this one included."""
        if is_main():
            numbers = rounded(numbers)
            record(self.folder / STEPS, {"step": step, "epoch": epoch, **numbers})
            self._plot(numbers, "train", step)

    def _plot(self, numbers: dict[str, Any], group: str, step: int) -> None:
        if self.writer is None:
            return
        for key, value in numbers.items():
            self.writer.add_scalar(f"{group}/{key.removeprefix(f'{group}_')}", value, step)
        self.writer.flush()


def last_words(error: BaseException, cfg: RetrievalConfig) -> str:
    """What the screen shows after the log has been closed: why the run ends."""
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "aborted"
    explained = explain(error, cfg)
    return f"error: {explained}" if explained else "".join(traceback.format_exception(error)).rstrip()


class ConsoleLog(logging.Handler):
    """Lines of the log with dates: kept until there is a file, then appended to it and flushed one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.lines: list[str] = []
        self.file: TextIO | None = None

    def open(self, path: Path) -> None:
        self.file = open(path, "a", encoding="utf-8")
        self._flush()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self._flush()

    def _flush(self) -> None:
        if self.file is None:
            return
        try:
            self.file.writelines(line + "\n" for line in self.lines)
            self.file.flush()
        except OSError:  # a full disk: the screen still has the line, and the next save says so
            pass
        self.lines.clear()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        super().close()


# ---- files of JSON lines --------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `record` wrote; a last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a line of JSON. Mend or remove it.") from None
    return rows


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not to be kept, in one step that either happens or does not."""
    if path.exists():
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if keep(row)), encoding="utf-8")
        os.replace(part, path)
