"""Bring an index up to date with its folder or archive: what is new is encoded, what has moved keeps its vector.

A picture is unchanged if size and time are, else if its digest is. A file that could not be opened has no digest, and
is tried again each time. A picture with the digest of another, moved or a copy, shares that one's vector. What is gone
leaves the index. A root that is missing or empty is refused: it is far more likely a disk that is not mounted than a
wish to delete everything. So is a folder in it that cannot be read and holds pictures of the index.
"""

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar, cast

from filelock import FileLock, Timeout
from PIL import Image

from data.findings import cores
from data.images import ImageStore
from models.loading import Blip
from retrieval.index import LOCK, Entry, IndexFolder, PartWriter
from retrieval.search import printable
from utils import Progress, Stopped, barrier, from_main, get_rank, get_world_size, is_main, never_stop

log = logging.getLogger("blip")
T = TypeVar("T")

PICTURES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff")
BATCH = 32


@dataclass
class Plan:
    """What is to be done: entries that only change in the manifest, paths that are gone, pictures to encode."""

    put: list[Entry] = field(default_factory=list)
    remove: list[bytes] = field(default_factory=list)
    encode: list[list[Entry]] = field(default_factory=list)  # pictures of equal bytes together
    unchanged: int = 0
    moved: int = 0

    def __str__(self) -> str:
        return (
            f"{sum(map(len, self.encode))} to encode, {self.moved} moved or copied, {self.unchanged} unchanged, "
            f"{len(self.remove)} gone"
        )


@contextmanager
def only_writer(index: IndexFolder) -> Iterator[None]:
    """Write an index as the only launch that does, of however many processes; ValueError while another one does.

    The first process holds the lock, which ends with it, also when it is killed.
    """
    lock = FileLock(index.folder / LOCK)

    def take() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{index.folder}: another process is writing this index: wait for it to end.") from None

    shared(take)
    try:
        yield
    finally:
        lock.release()


def update_index(index: IndexFolder, blip: Blip, verify: bool = False, poll: Callable[[], None] = never_stop) -> Plan:
    """Make the index that of its root as it is now; every process of a launch calls it. ValueError for no pictures.

    `verify`: compare digests of all files, not only of those whose size or time has changed, and try pictures again
    that could not be decoded. It takes over what others have written, so no other launch may be writing: see
    `only_writer`.
    """
    if is_main() and (count := index.merge_journals()):
        log.info("%d pictures that an earlier, interrupted run had done", count)
    store = index.pictures(blip.rule)
    plan = shared(lambda: make_plan(store, index.entries(), verify, poll))
    if is_main():
        log.info("%s: %s", store.root, plan)
        index.change(plan.put)
    encode_all(index, store, blip, plan.encode[get_rank() :: get_world_size()], poll)
    barrier()
    if is_main():
        index.merge_journals()
        index.change(remove=plan.remove)
    barrier()
    return plan


def shared(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, or the error or the stop that it ends in, on every process."""
    outcome: T | ValueError | OSError | Stopped | None = None
    if is_main():
        try:
            outcome = work()
        except (ValueError, OSError, Stopped) as error:
            outcome = error
    (outcome,) = from_main([outcome])
    if isinstance(outcome, ValueError | OSError | Stopped):
        raise outcome
    return cast(T, outcome)


def listing(store: ImageStore, known: Iterable[bytes] = ()) -> dict[bytes, tuple[int, int]]:
    """Size and time of every picture by its path; ValueError when there is none.

    A folder that cannot be read is left out with a warning; ValueError if it holds some of the `known` pictures, which
    would count as gone.
    """
    found: dict[bytes, tuple[int, int]] = {}
    unreadable: list[OSError] = []
    if store.shards:
        for member, size, time_ns in store.shards.listing():
            if os.fsencode(member).lower().endswith(PICTURES):
                found[os.fsencode(member)] = size, time_ns
    elif store.is_zip:
        for info in store.archive.infolist():
            path = os.fsencode(info.filename)
            if path.lower().endswith(PICTURES):
                time = datetime(*info.date_time, tzinfo=UTC).timestamp() if info.date_time[1] else 0
                found[path] = info.file_size, int(time * 1e9)
    else:
        root = os.fsencode(store.root)
        for folder, folders, files in os.walk(root, onerror=unreadable.append):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not name.lower().endswith(PICTURES):
                    continue
                try:
                    state = os.stat(path)
                except OSError:  # a link that leads nowhere, or just removed: to be noted as unreadable
                    found[os.path.relpath(path, root)] = 0, 0
                    continue
                if stat.S_ISREG(state.st_mode):
                    found[os.path.relpath(path, root)] = state.st_size, state.st_mtime_ns
    for error in unreadable:
        words = f"{printable(os.fsdecode(error.filename))}: this folder cannot be read ({error.strerror})"
        within = os.path.relpath(os.fsencode(error.filename), os.fsencode(store.root)) + b"/"
        if any(path.startswith(within) for path in known):
            raise ValueError(f"{words}, and pictures of it are in the index: nothing is changed. Make it readable.")
        log.warning("warning: %s: it is left out", words)
    if not found:
        kinds = ", ".join(kind.decode() for kind in PICTURES)
        raise ValueError(f"{store.root}: no pictures there ({kinds}): nothing is changed. Is the disk mounted?")
    return found


def make_plan(
    store: ImageStore, known: dict[bytes, Entry], verify: bool = False, poll: Callable[[], None] = never_stop
) -> Plan:
    """Compare what is there with what is known."""
    plan, there = Plan(), listing(store, known)
    by_digest = {entry.digest: entry for entry in known.values() if entry.part is not None}
    changed = [
        path for path, stat in there.items()
        if verify or path not in known or known[path][1:3] != stat or not known[path].digest
    ]  # fmt: skip
    plan.unchanged = len(there) - len(changed)
    progress, new = Progress("files read", len(changed), "files"), dict[bytes, list[Entry]]()
    for path, (digest, problem) in zip(changed, digests_of(store, changed, poll), strict=True):
        before, entry = known.get(path), Entry(path, *there[path], digest, error=problem or None)
        same = by_digest.get(digest)
        if problem:
            plan.put.append(entry)
        elif before is not None and before.digest == digest and not (verify and before.error):  # only touched
            plan.unchanged += 1
            plan.put.append(before._replace(size=entry.size, mtime_ns=entry.mtime_ns))
        elif same is not None:
            plan.moved += 1
            plan.put.append(entry._replace(part=same.part, row=same.row))
        else:
            new.setdefault(digest, []).append(entry)
        progress.add(1)
    plan.encode = list(new.values())
    plan.remove = [path for path in known if path not in there]
    return plan


def digests_of(store: ImageStore, paths: list[bytes], poll: Callable[[], None]) -> Iterator[tuple[bytes, str]]:
    """`digest_of` each file, of which several are read at once; no further one once `poll` has raised."""
    pool = ThreadPoolExecutor(min(8, cores()))
    try:
        for found in pool.map(lambda path: digest_of(store, path), paths):
            poll()
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def digest_of(store: ImageStore, path: bytes) -> tuple[bytes, str]:
    """16 bytes that tell contents apart, and '' or why the file cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with store.open_file(os.fsdecode(path)) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or encrypted member of an archive can raise nearly anything
        return b"", printable(str(error)) or type(error).__name__
    return digest.digest(), ""


def encode_all(
    index: IndexFolder, store: ImageStore, blip: Blip, groups: list[list[Entry]], poll: Callable[[], None]
) -> None:
    """Encode one picture of each group into a part of this process; a picture that cannot be read is noted as such."""
    if not groups:
        return
    writer = PartWriter(index.folder, index.head.keep_tokens)
    progress = Progress("encode", sum(map(len, groups)), "images")
    try:
        for part, pictures in decoded(store, groups):
            poll()
            good = [
                (same, picture) for same, picture in zip(part, pictures, strict=True) if not isinstance(picture, str)
            ]
            bad = [(same, picture) for same, picture in zip(part, pictures, strict=True) if isinstance(picture, str)]
            if good:
                tokens, feat = blip.encode([picture for _, picture in good])
                writer.append(
                    feat, tokens.float().cpu() if index.head.keep_tokens else None, [same for same, _ in good]
                )
            writer.note(entry._replace(error=str(reason)) for same, reason in bad for entry in same)
            progress.add(sum(map(len, part)))
    finally:
        writer.close()


def decoded(
    store: ImageStore, groups: list[list[Entry]]
) -> Iterator[tuple[list[list[Entry]], list[Image.Image | str]]]:
    """Batches of groups with a picture each, or why it cannot be read; the next batch is decoded meanwhile."""

    def decode(name: str) -> Image.Image | str:
        try:
            return store.load(name)
        except ValueError as error:
            return printable(str(error))  # the manifest takes only text

    parts = [groups[start : start + BATCH] for start in range(0, len(groups), BATCH)]
    with ThreadPoolExecutor(min(8, cores())) as pool:
        ahead = [pool.submit(decode, same[0].name) for same in parts[0]]
        for number, part in enumerate(parts):
            current = ahead
            following = parts[number + 1] if number + 1 < len(parts) else []
            ahead = [pool.submit(decode, same[0].name) for same in following]
            yield part, [future.result() for future in current]


def weights_match(index: IndexFolder, sha256: str, source: str) -> None:
    """ValueError naming both when the index was made with other weights."""
    if sha256 != index.head.weights_sha256:
        raise ValueError(
            f"{index.folder} was made with {index.head.checkpoint} (weights {index.head.weights_sha256[:12]}), but "
            f"{source} has weights {sha256[:12]}: their vectors cannot be compared. Make a new index."
        )
