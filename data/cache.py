"""Shards that are fetched when they are needed into a folder of limited size: data beyond one disk.

A shard appears there under its name only when it is whole. Its index stays when the shard goes.
"""

import hashlib
import logging
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from checkpoints.download import cache_folder
from configs.schema import RetrievalConfig
from data.shards import Shards, expand
from data.tars import INDEX, ShardError, TarIndex, known_index, open_index
from utils import Progress

logger = logging.getLogger(__name__)

ATTEMPTS, PAUSE_SECONDS = 3, 5.0
AT_ONCE = 2  # commands; more would need more room while sizes are not known yet


class ShardCache:
    """The shards `sources`; every process of a machine has such an object, and the folder is theirs together."""

    def __init__(self, sources: Sequence[str], command: str, folder: Path, limit: int) -> None:
        """`command` has {source} and {target} in it; `limit` in bytes, of all shards in `folder`."""
        self.sources, self.command, self.folder, self.limit = sources, shlex.split(command), folder, limit
        self.names = [source.rpartition("/")[2] for source in sources]
        if len(set(self.names)) < len(self.names):
            raise ShardError(f"{sources[0]} ...: shards that are fetched need different file names")
        self.paths = [folder / name for name in self.names]
        self.keep: set[int] = set()  # shards that no other one may push out
        self._now: set[int] = set()
        self._coming: dict[int, int] = {}  # shards that are being fetched, and their sizes as far as they are known
        self._largest = 0
        self._threads: list[threading.Thread] = []
        self._problem: Exception | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache_dir: {folder} cannot be made ({error.strerror}): name another folder") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": []}

    @cached_property
    def shards(self) -> Shards:
        """All members; the first call of all fetches each index, or each shard to make it."""
        progress, indexes = Progress("index of shards", len(self.names), "shards"), dict[int, TarIndex]()
        beside = not known_index(self.paths[0]) and self._fetch_index(0)
        first = len(self.names) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

        def index_of(number: int) -> tuple[int, TarIndex]:
            found = known_index(self.paths[number])
            if not found and beside and self._fetch_index(number):
                found = known_index(self.paths[number])
            if not found:
                self.keep.add(number)
                self.fetch(number)
                found, problem = open_index(self.paths[number])
                self.keep.discard(number)
                if problem:
                    raise ShardError(f"cache_dir: {found.file} cannot be written ({problem}): name another folder")
                self._largest = max(self._largest, found.size)
            return number, found

        with ThreadPoolExecutor(AT_ONCE) as pool:
            numbers = list(range(len(self.names)))
            for number, index in pool.map(index_of, numbers[first:] + numbers[:first]):
                indexes[number] = index
                progress.add(1)
        return Shards(self.folder, self.names, [indexes[number] for number in range(len(self.names))], self.fetch)

    def enter(self, now: Collection[int], after: Collection[int], others: Collection[int] = ()) -> None:
        """Have the shards `now`, fetch `after` meanwhile, keep `others` and those of before, and delete the rest.

        Raises what went wrong while shards were fetched ahead.
        """
        self.wait()
        if self._problem:
            problem, self._problem = self._problem, None
            raise problem
        self.keep = self._now | set(now) | set(after) | set(others)
        self._now = set(now)
        for number in set(range(len(self.names))) - self.keep:
            self.paths[number].unlink(missing_ok=True)
        start = time.monotonic()
        if absent := [number for number in now if not self.paths[number].exists()]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self.fetch, absent))
            logger.info("waited %.1f s for %d shards", time.monotonic() - start, len(absent))
        # Daemons, which the end of the program does not wait for.
        parts = [list(after)[i::AT_ONCE] for i in range(AT_ONCE)]
        self._threads = [threading.Thread(target=self._ahead, args=(part,), daemon=True) for part in parts]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until what is being fetched ahead is there, or cannot be fetched."""
        for thread in self._threads:
            thread.join()

    def _ahead(self, numbers: Iterable[int]) -> None:
        try:
            for number in numbers:
                self.fetch(number)
        except Exception as error:  # the main thread raises it
            self._problem = error

    def fetch(self, number: int) -> None:
        """Have one shard, whoever of this machine's processes fetches it; ShardError when that fails or it changed."""
        path = self.paths[number]
        if path.exists():
            return
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            known = known_index(path)
            self._coming[number] = known.size if known else self._largest
            try:
                self._make_room()
                part = self._run(self.sources[number], path)
                if known:
                    self._require_same(part, known, self.sources[number])
                os.replace(part, path)
            finally:
                self._coming.pop(number)
            self._make_room(number)

    def _require_same(self, part: Path, known: TarIndex, source: str) -> None:
        """ShardError unless the file has the size that its index states; it then gets the index's time as well."""
        size = part.stat().st_size
        if size != known.size:
            part.unlink()
            raise ShardError(
                f"{source} has {size} bytes, and had {known.size} when it was indexed: it was changed, or fetched in "
                f"part; if it is another one now, delete {known.file}"
            )
        os.utime(part, ns=(known.mtime_ns, known.mtime_ns))

    def _fetch_index(self, number: int) -> bool:
        """Fetch the index that lies beside a source; whether there is one."""
        path = self.paths[number].with_name(self.names[number] + INDEX)
        with FileLock(path.with_name(f".{path.name}.lock")):
            try:
                if not path.exists():
                    os.replace(self._run(self.sources[number] + INDEX, path, attempts=1), path)
            except ShardError:
                return False
        return known_index(self.paths[number]) is not None

    def _run(self, source: str, path: Path, attempts: int = ATTEMPTS) -> Path:
        """The command's file, under a name of its own; ShardError with the command's last words."""
        part = path.with_name(f".{path.name}.part")
        words = [word.replace("{source}", source).replace("{target}", os.fspath(part)) for word in self.command]
        said = ""
        for attempt in range(attempts):
            if attempt:
                logger.warning("%s: %s; trying again", source, said)
                time.sleep(PAUSE_SECONDS)
            part.unlink(missing_ok=True)
            try:
                done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
            except OSError as error:
                raise ShardError(f"fetch: {words[0]!r} cannot be started ({error.strerror})") from None
            if done.returncode == 0 and part.is_file():
                return part
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            said = f"exit status {done.returncode}" + (f", {last[0]}" if last else "")
            if done.returncode == 0:
                said = "exit status 0, but it wrote no file {target}"
        part.unlink(missing_ok=True)
        raise ShardError(f"{source} cannot be fetched with `{shlex.join(words)}` ({said})")

    def _make_room(self, spared: int = -1) -> None:
        """Delete the shards that came first and are in no plan, until all that is being fetched fits."""
        there = []
        for number, path in enumerate(self.paths):
            try:
                state = path.stat()
            except OSError:
                continue
            there.append((state.st_ctime_ns, state.st_size, number))
        total = sum(list(self._coming.values())) + sum(each for _, each, _ in there)
        for _, each, number in sorted(there):
            if total <= self.limit:
                return
            if number not in self.keep and number != spared:
                self.paths[number].unlink(missing_ok=True)
                total -= each


def open_cache(cfg: RetrievalConfig) -> ShardCache:
    """The cache of a config's image_root, the same object for the same keys."""
    return _open_cache(cfg.image_root, cfg.fetch, cfg.cache_dir, cfg.cache_gb)


@lru_cache(maxsize=4)
def _open_cache(image_root: str, fetch: str, cache_dir: str, cache_gb: float) -> ShardCache:
    folder = cache_folder(cache_dir) / f"shards-{hashlib.sha256(image_root.encode()).hexdigest()[:8]}"
    return ShardCache(expand(image_root), fetch, folder, round(cache_gb * 1e9))
