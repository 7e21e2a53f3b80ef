"""Processes, logging, schedules and seeds. Every helper is the identity for one process."""

import logging
import math
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger("blip")

# ---- processes ----------------------------------------------------------------------------------------------------


def init_distributed(device: str = "auto") -> torch.device:
    """Join the launcher's processes (torch.distributed.run sets WORLD_SIZE) and return this process's device.

    Without the launcher there is one process and no process group. CUDA uses nccl, the CPU gloo.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this PyTorch sees no CUDA device. Use --device cpu or install a CUDA build."
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return torch.device(device)


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if get_world_size() > 1 else 0


def is_main() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if get_world_size() > 1:
        dist.barrier()


def all_gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, without gradient: (n, ...) -> (W * n, ...)."""
    if get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast_model(model: nn.Module) -> None:
    """Give every process rank 0's weights and queues."""
    if get_world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(model: nn.Module, bucket_bytes: int = 64 << 20) -> None:
    """Average `.grad` over processes in flat buckets: what DistributedDataParallel does after its last `no_sync` pass.

    Done here since one step makes several backward passes through parts of the model, which DDP's hooks do not follow.
    """
    if get_world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    while grads:
        bucket, size = [], 0
        while grads and (not bucket or size + grads[0].nbytes <= bucket_bytes):
            bucket.append(grads.pop(0))
            size += bucket[-1].nbytes
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        flat /= get_world_size()
        for grad, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(piece.view_as(grad))


# ---- logging ------------------------------------------------------------------------------------------------------


def setup_logging() -> None:
    """INFO on rank 0, WARNING elsewhere."""
    logging.basicConfig(
        level=logging.INFO if is_main() else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Logs how far a long loop is, its rate and its ETA, at most every `every` seconds; silent when it is quick."""

    def __init__(self, what: str, total: int, unit: str, every: float = 10.0):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < self.every and not (self.done == self.total and self.last > self.start):
            return
        self.last = now
        rate = self.done / (now - self.start)
        eta = format_seconds((self.total - self.done) / rate)
        log.info("%s: %d / %d, %.0f %s/s, eta %s", self.what, self.done, self.total, rate, self.unit, eta)


def memory_mb(device: torch.device) -> float:
    """Peak memory so far: of this process on the GPU, or of this process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class NotFinite(ValueError):
    """A loss or gradient is infinite or not a number."""


class LossMeter:
    """Losses of an epoch: running means, a line every few seconds, and a stop where a number is not finite.

    The numbers of a step stay on the device; they are read one step later, when they have long arrived, so that the
    GPU never waits. `state.meters` carries the means over an interruption.
    """

    def __init__(self, name: str, steps: int, samples_per_step: int, device: torch.device, state, every: float = 10.0):
        self.name, self.steps, self.samples, self.device, self.every = name, steps, samples_per_step, device, every
        self.first = self.done = state.step
        self.sums = torch.tensor(state.meters.get("sums", [0.0, 0.0]), dtype=torch.float64, device=device)
        self.stop_requested = False
        self._pending: tuple | None = None
        self.start = self.last = time.monotonic()

    def update(self, report, grad_norm: Tensor, lr: float, names: list[str], stop: bool) -> None:
        """Take a step's StepReport (this process's share), its gradient norm, its images, and a wish to stop."""
        flags = torch.stack([report.starved, torch.tensor(stop, device=self.device)]).double()
        shared = all_reduce_sum(torch.cat([report.loss_sums.double().flatten(), flags]))
        losses = shared[:-2].view(-1, 2).mean(0)
        self.sums += losses
        self.done += 1
        values = torch.cat([losses, grad_norm.double()[None], shared[-2:]])  # (5,)
        if self.device.type == "cuda":
            self.flush()
            host = torch.empty(5, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
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
        loss_ita, loss_itm, grad_norm, starved, stop = values.tolist()
        where = f"{self.name}, step {step - 1}"
        if not all(map(math.isfinite, (loss_ita, loss_itm, grad_norm))):
            raise NotFinite(
                f"{where}: loss_ita {loss_ita}, loss_itm {loss_itm}, gradient norm {grad_norm} are not all finite. "
                f"Lower init_lr, or use precision fp32. Images of this step: {', '.join(names)}."
            )
        if starved:
            raise ValueError(
                f"{where}: a sample had no negative, as all images it could draw show the same one. Use a larger batch "
                "or give different images different image_id."
            )
        self.stop_requested = stop > 0
        self._print(step, loss_ita, loss_itm, grad_norm, lr)

    def _print(self, step: int, loss_ita: float, loss_itm: float, grad_norm: float, lr: float) -> None:
        now = time.monotonic()
        if now - self.last < self.every and step not in (self.first + 1, self.steps):
            return
        self.last = now
        rate = (step - self.first) / (now - self.start)
        log.info(
            "%s [%d/%d] eta %s  loss_ita %.4f  loss_itm %.4f  grad_norm %.2f  lr %.2e  %.1f images/s  %.0f MB",
            *(self.name, step, self.steps, format_seconds((self.steps - step) / rate)),
            *(loss_ita, loss_itm, grad_norm, lr, rate * self.samples, memory_mb(self.device)),
        )

    def save(self, state) -> None:
        self.flush()
        state.meters = {"sums": self.sums.tolist()}

    def means(self) -> dict[str, float]:
        """Mean loss_ita and loss_itm of the epoch."""
        self.flush()
        ita, itm = (self.sums / self.done).tolist()
        return {"loss_ita": ita, "loss_itm": itm}


class StopSignal:
    """Set by SIGTERM or SIGUSR1, a cluster's notice: the run saves at the next step and exits with EXIT_STOPPED."""

    EXIT_STOPPED = 75  # EX_TEMPFAIL: try again

    def __init__(self):
        self.received = False
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame) -> None:
        self.received = True


# ---- schedules, seeds and precision -----------------------------------------------------------------------------


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """BLIP's schedule: one value per epoch, from init_lr at epoch 0 towards min_lr."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def ramped_alpha(alpha: float, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Weight of the momentum targets: 0 -> alpha over epoch 0, alpha afterwards."""
    return alpha if epoch > 0 else alpha * min(1.0, step / steps_per_epoch)


def seed_from(*key: int) -> int:
    """A well-mixed seed from a few integers: every random draw is a function of (seed, step, rank)."""
    return int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device: torch.device, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_from(*key))


@contextmanager
def precision(model: nn.Module, name: str) -> Iterator[None]:
    """Compute in fp32, tf32 (float32 with 10-bit products on tensor cores) or bf16 (autocast of the encoders)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, model.autocast_dtype
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    model.autocast_dtype = torch.bfloat16 if name == "bf16" else None
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, model.autocast_dtype = before[1:]
