"""The numbers of training: mean losses of an epoch, warnings about what they hide, an error if one is not finite."""

import logging
import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.runs import RunState
from configs.schema import TEMP_RANGE
from data.retrieval import TrainBatch
from models.arrangements import on_device
from models.itm import NO_NEGATIVE
from training.journal import Journal
from training.step import StepReport
from utils import PRINT_SECONDS, NotFinite, all_reduce_sum, format_seconds, gather_names, is_main, memory_mb

log = logging.getLogger("blip")


class TrainingWarnings:
    """Warns, once in a run and topic, of what the curve of a loss does not show."""

    ITM_PRIOR = math.log(3) - 2 / 3 * math.log(2)  # 0.6365: loss_itm of always answering "one pair in three matches"
    WINDOW, AT_LEAST, EARLY = 200, 50, 500  # steps

    def __init__(self, steps_per_epoch: int):
        self.first_epoch = min(steps_per_epoch, self.EARLY)
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.steps = 0
        self.said: set[str] = set()

    def step(self, where: str, loss_itm: float, temp: float) -> None:
        """Take a step's numbers, which are on the host already."""
        self.steps += 1
        self.losses.append(loss_itm)
        mean = sum(self.losses) / len(self.losses)
        if self.steps >= max(self.first_epoch, self.AT_LEAST) and abs(mean - self.ITM_PRIOR) < 0.01:
            self.warn(
                "itm",
                f"{where}: loss_itm was {mean:.4f} over the last {len(self.losses)} steps, which is what guessing "
                f"gives ({self.ITM_PRIOR:.4f}): matching has learnt nothing yet. Start from a checkpoint (pretrained) "
                "whose text encoder has trained cross-attention; else train longer, with warmup_steps and "
                "random_negative_steps, and an init_lr that is neither for fine-tuning (1e-5) nor too high "
                "(from towers about 2e-4)",
            )
        low, high = TEMP_RANGE
        if not low * 1.0001 < temp < high * 0.9999:  # float32
            self.warn(
                "temp",
                f"{where}: the temperature is at its limit {low if temp < high / 2 else high} and cannot follow: lower "
                "temp_lr_scale or init_lr, and check that captions describe their images",
            )

    def warn(self, topic: str, message: str) -> None:
        """Log `message` on rank 0, unless something on that topic was said before."""
        if topic not in self.said and is_main():
            log.warning("warning: %s", message)
        self.said.add(topic)


class RunClock:
    """How long a run still takes: its steps at the present rate, its evaluations as long as the last one timed."""

    SETTLED, ENOUGH = 5, 20  # steps after which the rate counts, and after which it is a forecast

    def __init__(self, steps: int, epochs: int, test_share: float):
        self.steps, self.epochs, self.test_share = steps, epochs, test_share  # the test split in validations
        self.validation: float | None = None  # seconds
        self._since: tuple[int, float] | None = None
        self._said = False

    def left(self, epoch: int, step: int, seconds_per_step: float) -> float:
        """Seconds from `step` of `epoch` to the end of the run."""
        return self.steps_left(epoch, step) * seconds_per_step + self.validations_left(epoch) * (self.validation or 0)

    def steps_left(self, epoch: int, step: int) -> int:
        return (self.epochs - epoch) * self.steps - step

    def validations_left(self, epoch: int) -> float:
        return self.epochs - epoch + self.test_share

    def forecast(self, epoch: int, step: int, done: int) -> str:
        """After enough steps (`done` by this monitor), and once: what the rest of the run will take; '' otherwise."""
        now = time.monotonic()
        if self._said or not (done in (self.SETTLED, self.ENOUGH) or step == self.steps):
            return ""
        if done == self.SETTLED and step < self.steps:
            self._since = done, now
            return ""
        if self._since is None:  # fewer steps than would tell
            return ""
        self._said = True
        seconds = (now - self._since[1]) / (done - self._since[0])
        evaluations = (
            f"{self.epochs - epoch + 1} evaluations, {format_seconds(self.validation)} for the one of val"
            if self.validation is not None
            else "the evaluations not counted, as none was timed yet"
        )
        return (
            f"the rest of the run will take about {duration(self.left(epoch, step, seconds))}: "
            f"{self.steps_left(epoch, step)} steps of {seconds:.3g} s, and {evaluations}"
        )


def duration(seconds: float) -> str:
    """In the unit people plan in: '31 hours', '4.5 hours', '12 minutes', '40 seconds'."""
    hours = seconds / 3600
    if hours >= 2:
        return f"{hours:.0f} hours" if hours >= 10 else f"{hours:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


class EpochMonitor:
    """Losses of an epoch: running means, a line every PRINT_SECONDS, and an error if a number is not finite.

    The numbers of a step stay on the device; they are read one step later, when they have long arrived, so that the
    GPU never waits. `state.meters` carries the means over an interruption.
    """

    def __init__(
        self,
        steps: int,
        samples: int,
        state: RunState,
        device: torch.device,
        warnings: TrainingWarnings,
        clock: RunClock,
        journal: Journal,
    ):
        self.name, self.epoch, self.steps, self.samples = f"epoch {state.epoch}", state.epoch, steps, samples
        self.device, self.warnings, self.clock, self.journal = device, warnings, clock, journal
        self.first = self.done = state.step
        self.sums: dict[str, Tensor] = {  # of each term, over the steps done
            term: torch.tensor(value, dtype=torch.float64, device=device)
            for term, value in state.meters.get("sums", {}).items()
        }
        self.skipped = state.meters.get("skipped", 0)
        self.stop_requested = False
        self._pending: _Step | None = None
        self.start = self.last = time.monotonic()
        self._row = self.first, self.start  # the last one of steps.jsonl: its step, and when
        nowhere = None if is_main() else True  # None: only where the screen is no file
        self.bar = tqdm(total=steps, initial=self.first, desc=self.name, unit="step", leave=False, disable=nowhere)

    def update(
        self, report: StepReport, grad_norm: Tensor, temp: Tensor, lr: float, batch: TrainBatch, stop: bool
    ) -> None:
        """Take a step's report (this process's share), its gradient norm, its batch, and whether to stop."""
        terms = torch.stack([*report.by_rank.values()]).double()  # (terms, R)
        flags = on_device(self.device, np.array([float(stop), float(batch.skipped)]))
        shared = all_reduce_sum(torch.cat([terms.flatten(), report.starved.double()[None], flags]))
        means = shared[:-3].view_as(terms).mean(1)  # (terms,)
        self.done += 1
        for term, mean in zip(report.by_rank, means, strict=True):
            self.sums[term] = self.sums.get(term, 0) + mean
        values = torch.cat([means, torch.stack([grad_norm, temp]).double(), shared[-3:]])
        arrived = None
        if self.device.type == "cuda":
            self.flush()
            values = torch.empty(len(values), dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = _Step(self.done, lr, batch.names, list(report.by_rank), values, arrived)
        if arrived is None:
            self.flush()

    def flush(self) -> None:
        """Check the numbers of the last step and, when it is time, print them."""
        if self._pending is None:
            return
        step, lr, names, terms, values, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        *means, grad_norm, temp, starved, stop, skipped = values.tolist()
        numbers = dict(zip(terms, means, strict=True)) | {"grad_norm": grad_norm}
        where = f"{self.name}, step {step - 1}"
        if not all(math.isfinite(value) for value in numbers.values()):
            losses = "".join(f"{name} {value}, " for name, value in numbers.items() if name.startswith("loss_"))
            raise NotFinite(
                f"{where}: {losses}gradient norm {grad_norm} are not all finite. Lower init_lr, or use precision fp32.",
                gather_names(names),
            )
        if starved:
            raise ValueError(f"{where}: {NO_NEGATIVE}")
        self.stop_requested = stop > 0
        self.skipped += round(skipped)
        self.warnings.step(where, numbers["loss_itm"], temp)
        self._write(step, numbers, temp, lr)
        self._print(step, numbers, temp, lr)
        self.bar.update()
        if forecast := self.clock.forecast(self.epoch, step, step - self.first):
            log.info("%s", forecast)

    def _write(self, step: int, numbers: dict[str, float], temp: float, lr: float) -> None:
        """A row of steps.jsonl, when it is time; its rate is that since the row before."""
        run_step = self.epoch * self.steps + step
        if run_step % self.journal.cfg.log_every and step != self.steps:
            return
        now, (last, since) = time.monotonic(), self._row
        self._row = step, now
        rate, memory = (step - last) * self.samples / max(now - since, 1e-9), memory_mb(self.device)
        row = {**numbers, "temp": temp, "lr": lr, "images_per_second": rate, "memory_mb": memory}
        self.journal.step(run_step, self.epoch, row)

    def _print(self, step: int, numbers: dict[str, float], temp: float, lr: float) -> None:
        now = time.monotonic()
        if now - self.last < PRINT_SECONDS and step not in (self.first + 1, self.steps):
            return
        self.last = now
        rate = (step - self.first) / (now - self.start)
        digits = {"itm_acc": 3, "grad_norm": 2}
        log.info(
            "%s [%d/%d] eta %s, run %s  %s  temp %.4f  lr %.2e  %.1f images/s  %.0f MB",
            *(self.name, step, self.steps, format_seconds((self.steps - step) / rate)),
            format_seconds(self.clock.left(self.epoch, step, 1 / rate)),
            "  ".join(f"{name} {value:.{digits.get(name, 4)}f}" for name, value in numbers.items()),
            *(temp, lr, rate * self.samples, memory_mb(self.device)),
        )

    def save(self, state: RunState) -> None:
        self.flush()
        state.meters = {"sums": {term: value.item() for term, value in self.sums.items()}, "skipped": self.skipped}

    def means(self, with_skipped: bool = False) -> dict[str, float]:
        """Mean of each term over the epoch (always answering "no match" has an itm_acc of 2/3).

        `with_skipped` adds how often another image took the place of an unreadable one, over all processes.
        """
        self.flush()
        means = {term: (value / self.done).item() for term, value in self.sums.items()}
        if with_skipped:
            log.info("%s: %d times another image took the place of an unreadable one", self.name, self.skipped)
            means["skipped"] = self.skipped
        return means


class _Step(NamedTuple):
    """A step whose numbers are on their way to the host."""

    step: int
    lr: float
    names: list[str]  # images
    terms: list[str]
    values: Tensor  # the terms, gradient norm, temperature, and three flags
    arrived: torch.cuda.Event | None
