"""Downloads against a server on 127.0.0.1: interrupted and resumed, wrong answers, several processes at once."""

import hashlib
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from checkpoints import download
from checkpoints.download import cache_folder, local_path
from checkpoints.files import DamagedFile
from checkpoints.weights import read_weights
from tests.local_server import CONTENT, Handler, html_reply

fork = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_downloaded_once_then_found_without_the_network(server, tmp_path):
    path = local_path(server.url, str(tmp_path / "new" / "cache"))
    assert path.read_bytes() == CONTENT and path.suffix == ".pth" and path.name.startswith("model-")
    server.shutdown()
    assert local_path(server.url, str(path.parent)) == path
    assert names(path.parent) == [path.name, path.name + ".lock"] and len(server.requests) == 1


def test_broken_connections_are_continued_where_they_broke(server, tmp_path):
    server.cuts = [100_000, 50_000, 0]
    assert local_path(server.url, str(tmp_path)).read_bytes() == CONTENT
    assert [r.get("Range") for r in server.requests] == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]


def test_a_later_call_continues_what_was_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [200_000]
    with pytest.raises(ValueError, match="200000 bytes are kept"):
        local_path(server.url, str(tmp_path))
    assert local_path(server.url, str(tmp_path)).read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=200000-"
    assert len(names(tmp_path)) == 2  # the file and its lock


def test_file_that_changed_meanwhile_is_not_stitched_to_the_old_beginning(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [200_000]
    with pytest.raises(ValueError):
        local_path(server.url, str(tmp_path))
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert local_path(server.url, str(tmp_path)).read_bytes() == CONTENT[::-1]


def test_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.cuts = False, [200_000]
    assert local_path(server.url, str(tmp_path)).read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [0, 7])
def test_part_that_reaches_the_end(server, tmp_path, monkeypatch, extra):
    """Killed between the last byte and the rename; or a part that is longer than the file, so another file's."""
    part = tmp_path / (download._file_name(server.url) + ".part")
    part.write_bytes(CONTENT + bytes(extra))
    assert local_path(server.url, str(tmp_path)).read_bytes() == CONTENT
    assert len(server.requests) == (1 if extra == 0 else 2)


@pytest.mark.parametrize(("answer", "words"), [
    ((404, b"gone"), "answer 404 Not Found: check the address"),
    ((200, b"<html>sign in</html>", None), "web page"),
])  # fmt: skip
def test_wrong_answers_leave_no_file(server, tmp_path, monkeypatch, answer, words):
    server.answer = answer
    if answer[0] == 200:
        monkeypatch.setattr(Handler, "reply", html_reply)
    with pytest.raises(ValueError, match=words):
        local_path(server.url, str(tmp_path))
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == [] and len(server.requests) == 1


def test_web_page_sent_as_a_file_is_found_when_it_is_read(server, tmp_path):
    server.content = b"<!doctype html><title>quota exceeded</title>"
    with pytest.raises(DamagedFile, match="a web page"):
        read_weights(local_path(server.url, str(tmp_path)))


def test_server_errors_are_tried_again(server, tmp_path):
    server.answer = (503, b"")
    with pytest.raises(ValueError, match="cannot be downloaded .*503") as error:
        local_path(server.url, str(tmp_path))
    assert "kept" not in str(error.value) and not list(tmp_path.glob("*.part"))
    assert len(server.requests) == download.ATTEMPTS


def test_no_server_says_what_to_do_without_a_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="Connection refused.*Without a network"):
        local_path(server.url, str(tmp_path))


def test_too_little_room_is_said_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="make room"):
        local_path(server.url, str(tmp_path))
    assert not list(tmp_path.glob("*.pth"))


def test_processes_at_once_download_once(server, tmp_path):
    start, found = fork.Event(), fork.SimpleQueue()

    def child():
        start.wait(30)
        found.put(local_path(server.url, str(tmp_path)).read_bytes() == CONTENT)

    processes = [fork.Process(target=child) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [found.get() for _ in processes] == [True] * 3 and len(server.requests) == 1


def test_waiting_is_said_and_ends_when_the_holder_dies(server, tmp_path, caplog):
    path, locked = tmp_path / "a.json", fork.Event()

    def holder():
        with download._turn(path):
            locked.set()
            signal.pause()

    process = fork.Process(target=holder)
    process.start()
    assert locked.wait(30)

    class Kill(logging.Handler):
        def emit(self, record):
            os.kill(process.pid, signal.SIGKILL)

    download.log.addHandler(kill := Kill())
    try:
        with caplog.at_level(logging.INFO):
            download.fetch_to(server.url, path)
    finally:
        download.log.removeHandler(kill)
        process.join(30)
    assert caplog.messages[0] == "another process is downloading a.json: waiting"
    assert path.read_bytes() == CONTENT and process.exitcode == -signal.SIGKILL


def test_a_file_that_fails_its_check_is_not_kept(server, tmp_path):
    def refuse(part):
        assert part.read_bytes() == CONTENT
        raise ValueError("not what was wanted")

    with pytest.raises(ValueError, match="not what was wanted"):
        download.fetch_to(server.url, tmp_path / "a.json", refuse)
    assert names(tmp_path) == ["a.json.lock"]


def test_sha256_beside_the_file_is_compared(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(CONTENT)
    (tmp_path / "a.pth.sha256").write_text(f"{hashlib.sha256(CONTENT).hexdigest()}  a.pth\n")
    assert local_path(str(path)) == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="its SHA-256 is .*delete it"):
        local_path(str(path))


def test_cache_folder_precedence(monkeypatch):
    monkeypatch.setenv("BLIP_CACHE", "/from/environment")
    assert cache_folder("/from/config") == Path("/from/config") and cache_folder() == Path("/from/environment")
    monkeypatch.delenv("BLIP_CACHE")
    assert cache_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_released_files_keep_their_names_and_others_cannot_take_them(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "_download", lambda address, part: (asked.append(address), part.write_bytes(b"x")))
    assert local_path("model_base_14M.pth", str(tmp_path)) == tmp_path / "model_base_14M.pth"
    assert local_path("https://example.org/model_base_14M.pth", str(tmp_path)).name.startswith("model_base_14M-")
    assert asked == [download.RELEASES + "model_base_14M.pth", "https://example.org/model_base_14M.pth"]
