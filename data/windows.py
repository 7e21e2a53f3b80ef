"""The order of samples when only some shards are on the disk: windows of shards, and all samples of a window shuffled.

S shards, M samples. Where all shards fit there is one window, and its order is that of `GlobalBatchSampler` without it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import RetrievalConfig
from data.annotations import Annotations
from data.cache import ShardCache, open_cache

IN_CACHE = 3  # windows: the one before, which workers may still read, the current one, and the next
FEW_STEPS = 4  # of a window, below which its samples are hardly shuffled


class Windows:
    """Which shards are read together, and the order of the samples in them: functions of (seed, epoch)."""

    def __init__(self, shard_of: np.ndarray, sizes: Sequence[int], limit: int) -> None:
        """shard_of (M,): each sample's shard; sizes (S,) in bytes; `limit` of what may be on the disk at once."""
        self.shard_of, self.used = shard_of, np.unique(shard_of)  # (M,), (shards with samples,)
        self.sizes = np.asarray(sizes, np.int64)
        rest = int(self.sizes.sum() - self.sizes[self.used].sum())  # of other splits, which stay on the disk
        self.whole = bool(self.sizes.sum() <= limit)
        self.room = (limit - rest) // IN_CACHE
        largest = int(self.sizes[self.used].max())
        if not self.whole and self.room < largest:
            raise ValueError(
                f"cache_gb {limit / 1e9:g} is too small: it must hold {IN_CACHE} shards of up to {largest / 1e9:.3g} "
                f"GB, and {rest / 1e9:.3g} GB of shards without training samples: set it to at least "
                f"{(IN_CACHE * largest + rest) / 1e9:.3g}, or make smaller shards"
            )
        self._by_shard = np.argsort(shard_of, kind="stable")  # (M,) samples by shard
        counts = np.bincount(shard_of, minlength=len(self.sizes))
        self._starts = np.concatenate([[0], np.cumsum(counts)])  # (S + 1,)

    def of_epoch(self, seed: int, epoch: int) -> list[list[int]]:
        """The shards of each window: all shards in an order by (seed, epoch), cut where no more fit."""
        if self.whole:
            return [self.used.tolist()]
        windows, size = [list[int]()], 0
        for shard in np.random.default_rng([seed, epoch]).permutation(self.used).tolist():
            size += int(self.sizes[shard])
            if size > self.room:
                windows.append([])
                size = int(self.sizes[shard])
            windows[-1].append(shard)
        return windows

    def order(self, seed: int, epoch: int) -> Tensor:
        """(M,) every sample once, window after window."""
        generator, parts = torch.Generator().manual_seed(seed + epoch), []
        for window in self.of_epoch(seed, epoch):
            of_shards = [self._by_shard[self._starts[shard] : self._starts[shard + 1]] for shard in window]
            samples = torch.from_numpy(np.sort(np.concatenate(of_shards)))
            parts.append(samples[torch.randperm(len(samples), generator=generator)])
        return torch.cat(parts)

    def ends(self, seed: int, epoch: int) -> np.ndarray:
        """(windows,) the place in `order` at which each window ends."""
        counts = np.diff(self._starts)
        return np.cumsum([counts[window].sum() for window in self.of_epoch(seed, epoch)])


class Follower:
    """Tells the cache which window is read now and which comes next; a step that has begun asks it first."""

    def __init__(self, cache: ShardCache, windows: Windows, seed: int) -> None:
        self.cache, self.windows, self.seed = cache, windows, seed
        self.others = set(range(len(cache.names))) - set(windows.used.tolist())
        self.now: tuple[int, int, int] | None = None

    def __call__(self, epoch: int, first: int, last: int) -> None:
        """The samples `first` to `last` - 1 of the epoch's order are about to be read."""
        ends = self.windows.ends(self.seed, epoch)
        begin, end = (int(np.searchsorted(ends, min(p, ends[-1] - 1), "right")) for p in (first, last - 1))
        if self.now == (epoch, begin, end):
            return
        self.now = epoch, begin, end
        windows = self.windows.of_epoch(self.seed, epoch)
        after = windows[end + 1] if end + 1 < len(windows) else self.windows.of_epoch(self.seed, epoch + 1)[0]
        self.cache.enter([shard for window in windows[begin : end + 1] for shard in window], after, self.others)


def windows_of(cfg: RetrievalConfig, table: Annotations) -> Windows | None:
    """The windows of a training set, None where shards are not fetched."""
    if not cfg.fetch:
        return None
    cache = open_cache(cfg)
    shards = cache.shards
    number = np.array([shards.shard_of(name) for name in table.images], np.int64)
    return Windows(number[table.caption_image], [index.size for index in shards.indexes], cache.limit)


def window_warnings(cfg: RetrievalConfig, table: Annotations, seed: int) -> list[str]:
    """Windows so small that neighbours in the order come from few shards; ValueError below two steps, which would need
    more of them at once than IN_CACHE.
    """
    windows = windows_of(cfg, table)
    if windows is None or windows.whole:
        return []
    counts = np.diff(windows.ends(seed, 0), prepend=0)
    least, needed = int(counts.min()), max(cfg.queue_size, FEW_STEPS * (cfg.global_batch_size or 0))
    if least < 2 * (cfg.global_batch_size or 0):
        raise ValueError(
            f"cache_gb {cfg.cache_gb:g} makes windows of {least} samples, which are not two steps of "
            f"{cfg.global_batch_size}: raise cache_gb"
        )
    if least >= needed:
        return []
    return [
        f"cache_gb {cfg.cache_gb:g} makes {len(counts)} windows of shards an epoch, the smallest with {least} samples: "
        f"the queue of {cfg.queue_size} and {FEW_STEPS} steps of {cfg.global_batch_size} then come from few shards, "
        "which is less random than the whole set: raise cache_gb"
    ]
