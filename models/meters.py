"""The numbers of training: losses of an epoch, warnings for what they hide, a stop where one is not finite."""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from models.itc import TEMP_RANGE
from models.train_step import StepReport
from utils import PRINT_SECONDS, all_reduce_sum, format_seconds, gather_names, is_main, memory_mb

log = logging.getLogger("blip")


class NotFinite(ValueError):
    """A loss, gradient or score is infinite or not a number; `names`: the images of that step, of all processes."""

    def __init__(self, message: str, names: Sequence[str] = ()):
        super().__init__(message)
        self.names = list(names)


class Watch:
    """Warns, once each, of what the curve of a loss does not show, over all epochs of a run."""

    ITM_PRIOR = math.log(3) - 2 / 3 * math.log(2)  # 0.6365: loss_itm of always answering "one pair in three matches"
    WINDOW, AT_LEAST, EARLY = 200, 50, 500  # steps

    def __init__(self, steps_per_epoch: int = 0):
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
                f"{where}: loss_itm was {mean:.4f} over the last {len(self.losses)} steps, that of guessing "
                f"({self.ITM_PRIOR:.4f}): matching has learnt nothing yet. Start from a checkpoint (pretrained) whose "
                "text encoder has trained cross-attention; from random weights train longer, with warmup_steps and a "
                "higher init_lr",
            )
        low, high = TEMP_RANGE
        if not low * 1.0001 < temp < high * 0.9999:  # float32
            self.warn(
                "temp",
                f"{where}: the temperature is at its limit {low if temp < high / 2 else high} and cannot follow: lower "
                "temp_lr_scale or init_lr, and check that captions describe their images",
            )

    def near_chance(self, name: str) -> None:
        """Say that a split's Recall is what a random order gives."""
        self.warn(
            "chance",
            f"{name}: R@1 and R@10 are within noise of chance (2 sigma), nothing was learnt: check that captions "
            "describe their images, that a checkpoint is loaded (pretrained, finetuned), and init_lr",
        )

    def warn(self, topic: str, message: str) -> None:
        """Log `message` on rank 0, unless something on that topic was said before."""
        if topic not in self.said and is_main():
            log.warning("warning: %s", message)
        self.said.add(topic)


class LossMeter:
    """Losses of an epoch: running means, a line every few seconds, and a stop where a number is not finite.

    The numbers of a step stay on the device; they are read one step later, when they have long arrived, so that the
    GPU never waits. `state.meters` carries the means over an interruption.
    """

    def __init__(self, name: str, steps: int, samples: int, device: torch.device, state, watch: Watch):
        self.name, self.steps, self.samples, self.device, self.watch = name, steps, samples, device, watch
        self.first = self.done = state.step
        self.sums = torch.tensor(state.meters.get("sums", [0.0] * 3), dtype=torch.float64, device=device)
        self.skipped = state.meters.get("skipped", 0)
        self.stop_requested = False
        self._pending: tuple | None = None
        self.start = self.last = time.monotonic()

    def update(self, report: StepReport, grad_norm: Tensor, temp: Tensor, lr: float, batch, stop: bool) -> None:
        """Take a step's StepReport (this process's share), its gradient norm, its TrainBatch, and a wish to stop."""
        flags = torch.tensor([float(stop), float(batch.skipped)], dtype=torch.float64, device=self.device)
        shared = all_reduce_sum(torch.cat([report.sums.double().flatten(), report.starved.double()[None], flags]))
        losses, names = shared[:-3].view(-1, 3).mean(0), batch.names
        self.sums += losses
        self.done += 1
        values = torch.cat([losses, torch.stack([grad_norm, temp]).double(), shared[-3:]])  # (8,)
        if self.device.type == "cuda":
            self.flush()
            host = torch.empty(8, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = self.done, lr, names, host, arrived
        else:
            self._pending = self.done, lr, names, values, None
            self.flush()

    def flush(self) -> None:
        """Judge the last step and, when it is time, print it."""
        if self._pending is None:
            return
        step, lr, names, values, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        loss_ita, loss_itm, itm_acc, grad_norm, temp, starved, stop, skipped = values.tolist()
        where = f"{self.name}, step {step - 1}"
        if not all(map(math.isfinite, (loss_ita, loss_itm, grad_norm))):
            raise NotFinite(
                f"{where}: loss_ita {loss_ita}, loss_itm {loss_itm}, gradient norm {grad_norm} are not all finite. "
                "Lower init_lr, or use precision fp32.",
                gather_names(names),
            )
        if starved:
            raise ValueError(
                f"{where}: a sample had no negative, as all images it could draw show the same one. Use a larger batch "
                "or give different images different image_id."
            )
        self.stop_requested = stop > 0
        self.skipped += round(skipped)
        self.watch.step(where, loss_itm, temp)
        self._print(step, loss_ita, loss_itm, itm_acc, grad_norm, temp, lr)

    def _print(self, step: int, *numbers: float) -> None:
        now = time.monotonic()
        if now - self.last < PRINT_SECONDS and step not in (self.first + 1, self.steps):
            return
        self.last = now
        rate = (step - self.first) / (now - self.start)
        log.info(
            "%s [%d/%d] eta %s  loss_ita %.4f  loss_itm %.4f  itm_acc %.3f  grad_norm %.2f  temp %.4f  lr %.2e  "
            "%.1f images/s  %.0f MB",
            *(self.name, step, self.steps, format_seconds((self.steps - step) / rate)),
            *(*numbers, rate * self.samples, memory_mb(self.device)),
        )

    def save(self, state) -> None:
        self.flush()
        state.meters = {"sums": self.sums.tolist(), "skipped": self.skipped}

    def means(self, with_skipped: bool = False) -> dict[str, float]:
        """Mean loss_ita, loss_itm and itm_acc of the epoch (always answering "no match" has an itm_acc of 2/3).

        `with_skipped` adds how often another image took the place of an unreadable one, over all processes.
        """
        self.flush()
        means = dict(zip(("loss_ita", "loss_itm", "itm_acc"), (self.sums / self.done).tolist(), strict=True))
        if with_skipped:
            log.info("%s: %d times another image took the place of an unreadable one", self.name, self.skipped)
            means["skipped"] = self.skipped
        return means
