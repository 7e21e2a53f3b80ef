"""Files from an address: downloaded once per folder, however many processes ask, and resumed when cut off.

Addresses of the released files: https://github.com/salesforce/BLIP (README). No hashes were published with them: a file
is checked against the server's Content-Length, and against `<file>.sha256` where one lies beside it.
"""

import difflib
import hashlib
import http.client
import logging
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from filelock import FileLock, Timeout

from utils import Progress

log = logging.getLogger(__name__)

RELEASES = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
RELEASED = {
    "model_base.pth": "ViT-B pre-trained on 129M pairs",
    "model_base_14M.pth": "ViT-B pre-trained on 14M pairs",
    "model_base_capfilt_large.pth": "ViT-B pre-trained on 129M pairs, captions by ViT-L's CapFilt",
    "model_large.pth": "ViT-L pre-trained on 129M pairs",
    "model_base_retrieval_coco.pth": "ViT-B fine-tuned on COCO",
    "model_base_retrieval_flickr.pth": "ViT-B fine-tuned on Flickr30k",
    "model_large_retrieval_coco.pth": "ViT-L fine-tuned on COCO",
    "model_large_retrieval_flickr.pth": "ViT-L fine-tuned on Flickr30k",
}
CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # connections in a row that may break before the user is told
PAUSE_SECONDS = 2.0
TIMEOUT_SECONDS = 60.0
# Worth another attempt; other OSErrors are the disk's.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def local_path(source: str, cache_dir: str = "") -> Path:
    """The file or folder behind a path, an http(s) address, or the name of a released file (RELEASED)."""
    if address := _address(source):
        return _checked(_fetch(address, cache_folder(cache_dir)))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        return _checked(path)
    near = difflib.get_close_matches(path.name, RELEASED, n=1)
    raise ValueError(
        f"{source}: there is no such file or folder. Give a path, an http(s) address, or the name of a released "
        f"checkpoint ({f'did you mean {near[0]}?' if near else ', '.join(RELEASED)})."
    )


def is_to_be_downloaded(source: str, cache_dir: str = "") -> bool:
    """Whether `local_path` would download it."""
    address = _address(source)
    return bool(address) and not (cache_folder(cache_dir) / _file_name(address)).exists()


def _address(source: str) -> str:
    """Where it comes from if it is an address, or a released name that no file here has; else ''."""
    if re.match(r"https?://", source, re.IGNORECASE):
        return source
    return RELEASES + source if source in RELEASED and not Path(source).expanduser().exists() else ""


def cache_folder(cache_dir: str = "") -> Path:
    """`cache_dir`, else the environment's BLIP_CACHE, else torch.hub's."""
    folder = cache_dir or os.environ.get("BLIP_CACHE") or os.path.join(torch.hub.get_dir(), "checkpoints")
    return Path(folder).expanduser()


def _fetch(address: str, folder: Path) -> Path:
    path = folder / _file_name(address)
    try:
        fetch_to(address, path)
    except ValueError as error:
        raise ValueError(
            f"{error} Without a network: bring the file here by other means and give its path. `cache_dir` or "
            "BLIP_CACHE names another folder for downloads."
        ) from None
    return path


def fetch_to(address: str, path: Path, check: Callable[[Path], None] = lambda part: None) -> None:
    """Download `address` to `path` unless it is there: to `<name>.part`, which a later call completes, then renamed.

    `check` raises ValueError for a complete file that is not what was wanted, which is then not kept. Raises ValueError
    for what the network or a lack of room can cause, OSError for what the disk can.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path):
        if path.exists():  # another process has brought it meanwhile
            return
        part = path.with_name(path.name + ".part")
        _download(address, part)
        _etag_file(part).unlink(missing_ok=True)
        try:
            check(part)
        except ValueError:
            part.unlink()
            raise
        os.replace(part, path)
        log.info("downloaded %s to %s", address, path)


def _turn(path: Path) -> AbstractContextManager:
    """The lock of a file, for processes of one machine or one file system; it ends with the process that holds it."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is downloading %s: waiting", path.name)
        return lock.acquire()


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _file_name(address: str) -> str:
    """The address's own file name; unless it is a released file, with a hash, as other hosts reuse such names."""
    name = Path(unquote(urlparse(address).path)).name or "checkpoint"
    if address == RELEASES + name:
        return name
    return f"{Path(name).stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{Path(name).suffix}"


def _download(address: str, part: Path) -> None:
    """Complete `part`, over several connections if they break."""
    error: object = None  # of the last attempt, for the message
    for attempt in range(ATTEMPTS):
        if attempt:
            log.warning("%s: connection lost at %d bytes (%s), trying again", address, _size(part), error)
            time.sleep(PAUSE_SECONDS)
        try:
            _receive(address, part)
            return
        except urllib.error.HTTPError as answer:
            if answer.code == 416:  # nothing lies behind the part's end
                if answer.headers.get("Content-Range", "").endswith(f"/{_size(part)}"):
                    return
                part.unlink()  # longer than the file: the part is of another one
            elif answer.code < 500:
                raise ValueError(f"{address}: answer {answer.code} {answer.reason}: check the address.") from None
            error = answer
        except NETWORK_ERRORS as problem:
            error = getattr(problem, "reason", problem)
            if isinstance(error, socket.gaierror):
                break  # no network: waiting would only delay the message
    kept = f"; {_size(part)} bytes are kept in {part}, the next call goes on from there" if _size(part) else ""
    raise ValueError(f"{address}: cannot be downloaded ({error}){kept}.")


def _receive(address: str, part: Path) -> None:
    """One connection: append to `part` what is missing; OSError if it ends early."""
    etag_file = _etag_file(part)
    request = urllib.request.Request(address, headers={"User-Agent": "blip-retrieval"})
    start = _size(part)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if etag_file.exists():
            request.add_header("If-Range", etag_file.read_text())  # all of it again if the file has changed
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError(f"{address}: the server answers with a web page, not a file: check the address.")
        if answer.status != 206:
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError(f"{address}: the server resumes at another byte than asked: delete {part} and try again.")
        length = answer.headers.get("Content-Length")
        _require_space(part, int(length or 0))
        if answer.headers.get("ETag"):
            etag_file.write_text(answer.headers["ETag"])
        log.info("downloading %s%s", address, f", from byte {start}" if start else "")
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            received = _copy(answer, file, int(length or 0), part.stem)
    if length and received < int(length):
        raise http.client.IncompleteRead(b"", int(length) - received)


def _copy(answer, file, length: int, name: str) -> int:
    """Bytes written to `file` and synced, also when the connection breaks."""
    progress = Progress(f"download {name}", -(-length // CHUNK), "MiB") if length else None
    received = 0
    try:
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            received += len(chunk)
            if progress:
                progress.add(1)
    finally:
        file.flush()
        os.fsync(file.fileno())
    return received


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise ValueError(
            f"{part.parent}: {needed / 1e9:.2f} GB are to be downloaded and {free / 1e9:.2f} GB are free: make room."
        )


def _checked(path: Path) -> Path:
    """`path`, after comparing it with `<file>.sha256` (its first word) when there is one."""
    beside = path.with_name(path.name + ".sha256")
    if beside.exists():
        wanted = (beside.read_text().split() or [""])[0].lower()
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(
                f"{path}: its SHA-256 is {found}, but {beside.name} says {wanted or 'nothing'}: delete it and download "
                "it again."
            )
    return path
