"""Which samples a process trains on in each step, and the loaders of training and evaluation.

Source of the order: `torch.utils.data.DistributedSampler`, as BLIP uses it on as many ranks as the recipe has GPUs.
b samples of a rank in a step, S image side.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, Subset

from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.cache import open_cache
from data.images import open_store
from data.retrieval import EvalImages, RetrievalTrain, collate_train
from data.windows import Follower, Windows, windows_of
from transform.image import MEAN, STD, eval_transform, train_transform

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20  # that a loader's worker lives on after SIGTERM


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of each optimizer step, for those `ranks` of the recipe that this process plays.

    Rank r of the recipe gets in step i what `DistributedSampler(num_replicas=ranks, rank=r, shuffle=True, seed=seed)`
    and a batch of b = global_batch // ranks with drop_last give it. Each step is one list, the local ranks one after
    the other, so len(local_ranks) * b pairs. The length is that of a whole epoch in steps, whatever start_step is.
    """

    def __init__(self, num_samples: int, global_batch: int, ranks: int, local_ranks: range, seed: int) -> None:
        assert global_batch % ranks == 0 and 0 <= min(local_ranks) <= max(local_ranks) < ranks
        self.num_samples, self.ranks, self.local_ranks, self.seed = num_samples, ranks, local_ranks, seed
        self.rank_batch = global_batch // ranks
        self.rank_samples = -(-num_samples // ranks)  # the first samples come again, so that no rank gets fewer
        self.epoch, self.start_step = 0, 0
        self.windows: Windows | None = None
        self.follower: Follower | None = None  # told of each step before it is read
        if len(self) == 0:
            raise ValueError(
                f"{num_samples} training captions do not fill one global batch of {global_batch}: "
                "lower global_batch_size (or batch_size_train), or add data"
            )

    def __len__(self) -> int:
        return self.rank_samples // self.rank_batch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration and, when resuming inside it, the first step still to do."""
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, b = self.epoch, self.rank_batch
        if self.windows:
            order = self.windows.order(self.seed, epoch)
        else:
            order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))
        order = order.repeat(-(-self.rank_samples * self.ranks // self.num_samples))[: self.rank_samples * self.ranks]
        by_rank = order.view(self.rank_samples, self.ranks).T  # (ranks, samples of a rank)
        local = by_rank[self.local_ranks.start : self.local_ranks.stop]
        batch = b * self.ranks
        for step in range(self.start_step, len(self)):
            if self.follower:
                self.follower(epoch, step * batch, (step + 1) * batch)
            yield [(epoch, index) for index in local[:, step * b : (step + 1) * b].flatten().tolist()]


class Loader(DataLoader):
    """A DataLoader whose workers' ValueErrors arrive as the one paragraph they are, without the worker's traceback.

    A worker's death is always a RuntimeError of torch's words.
    """

    def __iter__(self) -> Iterator:  # type: ignore[override]  # a generator around torch's own iterator
        batches: Any = super().__iter__()
        paragraph = None
        try:
            yield from batches
        except ValueError as error:
            logger.debug("while loading: %s", error)
            paragraph = str(error).rpartition("\nValueError: ")[2].strip()
            # All three hold on to the workers, which end without them.
            error.__traceback__ = self._iterator = batches = None
        except (ConnectionError, EOFError) as error:  # of a worker that is gone before torch has noticed
            raise RuntimeError(death_of(getattr(batches, "_workers", ())) or str(error)) from error
        if paragraph is not None:
            raise ValueError(paragraph)


def death_of(workers: Sequence[Any], patience: float = 5.0) -> str:
    """What torch says when one of these processes has ended; '' if none does within `patience` seconds."""
    deadline = time.monotonic() + patience * bool(workers)
    while time.monotonic() < deadline:
        for worker in workers:
            if worker.exitcode is not None:
                code = worker.exitcode
                how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else f"exited with code {code}"
                return f"DataLoader worker (pid {worker.pid}) {how}"
        time.sleep(0.02)
    return ""


def worker_died(error: Exception) -> bool:
    """Whether this is what a DataLoader raises, at any moment, when a worker has ended."""
    words = ("DataLoader worker (pid", "Pin memory thread exited")  # the second on a GPU, where that thread asks them
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


def _start_worker(_: int) -> None:
    """One thread for each worker: several workers with a pool each slow one another down.

    A stop signal may reach the whole group of processes. Workers then go on for a while, until the main process has
    saved and ends them.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _common(workers: int, device: torch.device) -> dict[str, Any]:
    """Options of both loaders; their own generator keeps the global one, which dropout draws from, untouched."""
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": _start_worker,
        "generator": torch.Generator().manual_seed(0),
    }


def recipe_sampler(
    cfg: RetrievalConfig, table: Annotations, seed: int, processes: int = 1, process: int = 0
) -> GlobalBatchSampler:
    """The batches of `process`, which plays an equal share of the ranks that the config emulates."""
    local = cfg.ranks_emulated // processes
    ranks = range(process * local, (process + 1) * local)
    sampler = GlobalBatchSampler(len(table.captions), cfg.global_batch_size, cfg.ranks_emulated, ranks, seed)
    sampler.windows = windows_of(cfg, table)
    return sampler


def normalisation(cfg: RetrievalConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the colours: the config's, else BLIP's."""
    return cfg.image_mean or MEAN, cfg.image_std or STD


def train_loader(
    cfg: RetrievalConfig, annotations: Annotations, sampler: GlobalBatchSampler, device: torch.device
) -> DataLoader:
    """`TrainBatch` after `TrainBatch` in the sampler's order, one for each optimizer step."""
    build = train_transform if cfg.augment else eval_transform
    transform = build(cfg.image_size, *normalisation(cfg))
    skip = cfg.on_bad_sample == "skip"
    if sampler.windows:
        sampler.follower = Follower(open_cache(cfg), sampler.windows, sampler.seed)
    return Loader(
        RetrievalTrain(annotations, open_store(cfg), transform, sampler.seed, skip),
        batch_sampler=sampler,
        collate_fn=partial(collate_train, tokenizer=annotations.tokenizer),
        persistent_workers=cfg.num_workers > 0,
        **_common(cfg.num_workers, device),
    )


def eval_image_loader(
    cfg: RetrievalConfig, annotations: Annotations, indices: Sequence[int], device: torch.device
) -> DataLoader:
    """(b, 3, S, S) float32 batches of the images `indices` of the gallery, in their order; the last may be smaller."""
    images = EvalImages(annotations, open_store(cfg), eval_transform(cfg.image_size, *normalisation(cfg)))
    workers = min(cfg.num_workers, -(-len(indices) // cfg.batch_size_test))
    return Loader(Subset(images, indices), batch_size=cfg.batch_size_test, **_common(workers, device))
