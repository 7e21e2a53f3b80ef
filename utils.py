"""Processes, logging, files, seeds and precision. Every helper is the identity for one process."""

import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather as gather_with_gradient

log = logging.getLogger("blip")

PRINT_SECONDS = 10.0  # between lines of progress
NAMED_IMAGES = 10  # of a step, in an error message
BUCKET_BYTES = 64 << 20  # of gradients that are averaged in one call
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # on Linux, where a driver is loaded

# ---- processes ----------------------------------------------------------------------------------------------------


def init_distributed(device: str = "auto") -> torch.device:
    """Join the launcher's processes (torch.distributed.run sets WORLD_SIZE) and return this process's device.

    Without the launcher there is one process and no process group. CUDA uses nccl, the CPU gloo.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("mps"):
        raise ValueError(f"--device {device}: Apple's GPUs are not supported. Use --device cpu.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this PyTorch sees no CUDA device. "
            f"{unused_driver() or 'Use --device cpu or install a CUDA build.'}"
        )
    number = int(device.partition(":")[2] or 0) if re.fullmatch(r"cpu|cuda(:\d+)?", device) else -1
    if not 0 <= number < max(1, torch.cuda.device_count()):
        raise ValueError(f"--device {device}: there is no such device. Use cpu, cuda, or cuda:N of a GPU that exists.")
    if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and torch.cuda.device_count() > 1:
        raise ValueError(f"--device {device}: all processes of this machine would share it. Use --device cuda.")
    if device == "cuda":
        local, present = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= present:
            raise ValueError(
                f"LOCAL_RANK is {local}, which needs {local + 1} GPUs, but this process sees {present}: start with "
                f"--nproc_per_node={present}, or let CUDA_VISIBLE_DEVICES name {local + 1} GPUs."
            )
        device = f"cuda:{local}"
    # oneDNN keeps what it compiled for each shape, and hardly two steps have the same number of tokens: with its own
    # limit of 1,024, bfloat16 training on a CPU grows by gigabytes and slows down. This holds a step's shapes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # fairscale saves the random state of the current device
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _join(torch.device(device))
    return torch.device(device)


def unused_driver() -> str:
    """What to do where there is an NVIDIA driver that this PyTorch cannot use; '' where that is not so."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
    if torch.cuda.is_available() or hidden or not (torch.version.cuda and NVIDIA_DRIVER.exists()):
        return ""
    return (
        f"There is an NVIDIA driver, but it is too old for this PyTorch's CUDA {torch.version.cuda}, or gives this "
        "process no GPU: update the driver, install a PyTorch for an older CUDA, or say --device cpu."
    )


def _join(device: torch.device) -> None:
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # The launcher keeps its store over restarts: without a name of their own, restarted processes may look for
        # each other at the addresses of dead ones, and wait. (Several machines do not share one count.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=2),
        device_id=device if cuda else None,  # else nccl guesses, and barriers may take another process's GPU
    )


def leave_distributed(patience: float = 10.0) -> None:
    """Take leave of the other processes; where one is no longer there to answer, after `patience` seconds."""
    if dist.is_available() and dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(patience)


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


def all_gather_with_gradient(x: Tensor) -> Tensor:
    """The same with gradient, which every process adds to."""
    return torch.cat(gather_with_gradient(x.contiguous())) if get_world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_names(names: list[str]) -> list[str]:
    """The lists of all processes, in rank order."""
    if get_world_size() == 1:
        return names
    parts: list[list[str]] = [[] for _ in range(get_world_size())]
    dist.all_gather_object(parts, names)
    return [name for part in parts for name in part]


def from_main(value: list[Any]) -> list[Any]:
    """Rank 0's list on every process."""
    box = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_model(model: nn.Module) -> None:
    """Give every process rank 0's weights and queues."""
    if get_world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(model: nn.Module) -> None:
    """Average `.grad` over processes in flat buckets: what DistributedDataParallel does after its last `no_sync` pass.

    Done here since one step makes several backward passes through parts of the model, which DDP's hooks do not follow.
    """
    if get_world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    while grads:
        bucket: list[Tensor] = []
        size = 0
        while grads and (not bucket or size + grads[0].nbytes <= BUCKET_BYTES):
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
    """Logs how far a long loop is, its rate and its ETA, a line in PRINT_SECONDS at most; silent when it is quick."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < PRINT_SECONDS and not (self.done == self.total and self.last > self.start):
            return
        self.last = now
        rate = self.done / (now - self.start)
        eta = format_seconds((self.total - self.done) / rate)
        log.info("%s: %d / %d, %.0f %s/s, eta %s", self.what, self.done, self.total, rate, self.unit, eta)


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, on the GPU or else on the host (0 where it is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# ---- files -------------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parent


def find_path(path: str | os.PathLike) -> Path:
    """A relative path from the working directory or, if it is not there, from the repository root."""
    here = Path(path).expanduser()
    there = REPOSITORY / here  # an absolute path stays what it is
    return there if there.exists() and not here.exists() else here


@cache
def code_version() -> str:
    """Which code runs: "0.9.0 (3f2a1bc901)" with the commit, "..., modified)" if files differ, "0.9.0" without git."""
    version = _version(REPOSITORY)
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "--short=10", "HEAD").splitlines()
        if Path(top).resolve() != REPOSITORY:  # somebody else's checkout, which this one lies in
            return version
        modified = _git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, no checkout, no commit, no answer
        return version
    return f"{version} ({commit}{', modified' if modified else ''})"


def _version(folder: Path) -> str:
    try:
        return str(tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    try:
        return importlib.metadata.version("blip-retrieval")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*args: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


# ---- stop signals -------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised where work is left because a stop signal came."""


class StopSignal:
    """Notices the first SIGINT, SIGTERM or SIGUSR1 while it is entered; work then asks `poll` where it may be left.

    A second SIGINT raises KeyboardInterrupt. A terminal's Ctrl-C reaches a process twice under the launcher, which
    passes it on: what follows within REPEAT_SECONDS is the same one.
    """

    EXIT_STOPPED = 75  # EX_TEMPFAIL: try again
    REPEAT_SECONDS = 1.0

    def __init__(self) -> None:
        self.received = ""  # name of the first signal
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = signal.Signals(number).name, now
            if is_main():  # not through logging, whose lock or stream the signal may have interrupted
                again = "; Ctrl-C again aborts without saving" if number == signal.SIGINT else ""
                os.write(2, f"\n{self.received}: leaving at the next place where nothing is lost{again}\n".encode())
        elif number == signal.SIGINT and now - self._since > self.REPEAT_SECONDS:
            raise KeyboardInterrupt

    def poll(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.received:
            raise Stopped(self.received)


def never_stop() -> None:
    """A `poll` for work that nobody stops."""


# ---- run folder ---------------------------------------------------------------------------------------------------


def record(path: Path, stats: dict[str, Any]) -> None:
    """Append one JSON line to a file of the run folder."""
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")


def name_images(names: list[str], path: Path) -> str:
    """A sentence with the first images of a step; where there are more, `path` gets them all, one a line."""
    if not names:
        return ""
    if len(names) <= NAMED_IMAGES:
        return f" Images of this step: {', '.join(names)}."
    if is_main():
        path.write_text("\n".join(names) + "\n", encoding="utf-8")
    named, more = ", ".join(names[:NAMED_IMAGES]), len(names) - NAMED_IMAGES
    return f" Images of this step: {named} and {more} more, all in {path}."


class NotFinite(ValueError):
    """A loss, gradient or score is infinite or not a number; `names`: the images of that step, of all processes."""

    def __init__(self, message: str, names: Sequence[str] = ()):
        super().__init__(message)
        self.names = list(names)


# ---- seeds and precision --------------------------------------------------------------------------------------------


def seed_from(*key: int) -> int:
    """A well-mixed seed from a few integers: every random draw is a function of (seed, step, rank)."""
    return int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device: torch.device, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_from(*key))


def choose_precision(name: str, device: torch.device, evaluation: bool = False) -> str:
    """What `auto` means on this device; any other name stays.

    On a GPU the published numbers were made in TF32, the default of their time. In evaluation bfloat16 gives float32's
    Recall (`retrieval/recheck.py`), and is faster where the GPU has it.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return ("bf16" if ampere else "fp32") if evaluation else "tf32"


class HasPrecision(Protocol):
    """A model whose encoders compute under autocast to this dtype, or as they are when it is None."""

    autocast_dtype: torch.dtype | None


@contextmanager
def precision(model: HasPrecision, name: str) -> Iterator[None]:
    """Compute in fp32, tf32 (float32 with 10-bit products on tensor cores) or bf16 (autocast of the encoders).

    cuDNN's attention is off inside: it plans each new shape for tens of milliseconds, and here shapes are always new.
    """
    assert name != "auto", "choose_precision comes first"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, model.autocast_dtype
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    model.autocast_dtype = torch.bfloat16 if name == "bf16" else None
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, model.autocast_dtype = before[1:]
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
