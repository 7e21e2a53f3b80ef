"""A web server on 127.0.0.1 for tests of downloads: interrupted, resumed, wrong answers."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CONTENT = bytes(range(256)) * 2000  # 512 kB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with Range and ETag; `server.cuts` are bytes after which connections break."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        server.paths.append(self.path)
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


def html_reply(self, status, body, cut=None):
    self.send_response(status)
    self.send_header("Content-Type", "text/html; charset=utf-8")
    self.end_headers()
    self.wfile.write(body)


@contextmanager
def serving() -> Iterator[http.server.ThreadingHTTPServer]:
    """The server, whose attributes a test sets before it asks for `server.url`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.etag, server.ranges, server.answer = CONTENT, '"one"', True, None
        server.requests, server.paths, server.cuts = [], [], []
        server.folder = f"http://127.0.0.1:{server.server_port}/files/"
        server.url = f"{server.folder}model.pth?token=1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
