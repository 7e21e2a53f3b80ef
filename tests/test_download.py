"""Downloads against a server on 127.0.0.1: interrupted and resumed, wrong answers, several processes at once."""

import hashlib
import http.server
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from checkpoints import download
from checkpoints.download import cache_folder, local_path
from checkpoints.weights import DamagedFile, read_weights

CONTENT = bytes(range(256)) * 2000  # 512 kB
fork = multiprocessing.get_context("fork")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with Range and ETag; `server.cuts` are bytes after which connections break."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.answer:
            return self.reply(*server.answer)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start and self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        total = len(server.content)
        if start and start >= total:
            return self.reply(416, b"", **{"Content-Range": f"bytes */{total}"})
        body = server.content[start:]
        ranged = {"Content-Range": f"bytes {start}-{total - 1}/{total}"} if start and server.ranges else {}
        body = body if ranged else server.content
        self.reply(206 if ranged else 200, body, server.cuts.pop(0) if server.cuts else None, **ranged)

    def reply(self, status, body, cut=None, **headers):
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body)),
                   "ETag": self.server.etag, **headers}  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.etag, server.ranges, server.answer = CONTENT, '"one"', True, None
        server.requests, server.cuts = [], []
        server.url = f"http://127.0.0.1:{server.server_port}/files/model.pth?token=1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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


def html_reply(self, status, body, cut=None):
    self.send_response(status)
    self.send_header("Content-Type", "text/html; charset=utf-8")
    self.end_headers()
    self.wfile.write(body)


def test_web_page_sent_as_a_file_is_found_when_it_is_read(server, tmp_path):
    server.content = b"<!doctype html><title>quota exceeded</title>"
    with pytest.raises(DamagedFile, match="a web page"):
        read_weights(local_path(server.url, str(tmp_path)))


def test_server_errors_are_tried_again(server, tmp_path):
    server.answer = (503, b"")
    with pytest.raises(ValueError, match="503.*0 bytes are kept"):
        local_path(server.url, str(tmp_path))
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
