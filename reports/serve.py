"""The page of an index: type a sentence or drop a picture, and see what is found. For one user on one machine.

What keeps it safe: it listens on this machine unless told otherwise, and then asks for a random token; requests need a
known Host, and what costs something a POST of the same origin; pictures go out by number, decoded and encoded anew,
never by a path from outside; uploads are bounded in bytes and, by their header, in pixels; captions and names are text
to the page; nothing is fetched from anywhere; one query uses the model at a time, a few wait, the others get 503.
"""

import hmac
import io
import json
import platform
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import anyio.to_thread
import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from data.images import ImageStore
from reports.heatmaps import draw_heatmap, seen_by_model
from reports.pages import TEMPLATES
from retrieval.search import Searcher, as_json, hit_json, printable, require_text

T = TypeVar("T")

MAX_UPLOAD, MAX_PIXELS, MAX_TEXT = 20 << 20, 50_000_000, 1000  # bytes, pixels, letters
WAITING = 8  # queries that wait for the model
TOP, RERANK = 24, 32
SIZES = {"small": 320, "large": 1600}  # pixels of a picture's longer side
COOKIE = "blip_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Busy(Exception):
    """Too many queries wait already."""


class Refused(Exception):
    """What the user sent cannot be used; the message says why."""


class OneAtATime:
    """The model's lock, with a bounded queue."""

    def __init__(self, waiting: int = WAITING):
        self.lock, self.places = threading.Lock(), threading.BoundedSemaphore(waiting + 1)

    @contextmanager
    def turn(self):
        if not self.places.acquire(blocking=False):
            raise Busy
        try:
            with self.lock:
                yield
        finally:
            self.places.release()


class Guard(BaseHTTPMiddleware):
    """Host, origin and token of every request; headers of every answer."""

    def __init__(self, app: Any, hosts: frozenset[str], token: str):
        super().__init__(app)
        self.hosts, self.token = hosts, token

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = self.refusal(request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    def refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "").lower()
        if host not in self.hosts:
            return PlainTextResponse("unknown Host: open an address that search.py printed, or start with --host", 421)
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        if request.method not in ("GET", "HEAD") and (
            (origin is not None and origin.lower() != f"http://{host}") or site not in ("same-origin", "none")
        ):
            return PlainTextResponse("requests of other origins are refused", 403)
        if not self.token:
            return None
        given = request.query_params.get("token", "")
        if request.url.path == "/" and given and hmac.compare_digest(given.encode(), self.token.encode()):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        if not hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self.token.encode()):
            return PlainTextResponse("open the address that was printed at the start: it has the token", 403)
        return None


class Page:
    """The handlers of the page."""

    def __init__(self, searcher: Searcher):
        self.searcher, self.turns = searcher, OneAtATime()
        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
        index = searcher.index
        self.html = environment.get_template("search.html").render(
            root=printable(index.head.root), pictures=len(searcher.entries)
        )

    async def run(self, work: Callable[[], T]) -> T:
        """`work` with the model, in a thread, when it is its turn."""

        def in_turn() -> T:
            with self.turns.turn():
                return work()

        return await anyio.to_thread.run_sync(in_turn)

    async def home(self, request: Request) -> Response:
        return HTMLResponse(self.html)

    async def icon(self, request: Request) -> Response:
        return Response(status_code=204)

    async def static(self, request: Request) -> Response:
        kinds = {"search.js": "text/javascript", "search.css": "text/css"}
        name = request.path_params["name"]
        if name not in kinds:
            return PlainTextResponse("not found", 404)
        return Response((TEMPLATES / name).read_bytes(), media_type=kinds[name])

    async def search(self, request: Request) -> Response:
        """{"text": ..., "rerank": false} -> contrast at once; with true the re-ranked list."""
        values = await read_json(request)
        text, rerank = values.get("text"), RERANK if values.get("rerank") else 0
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
            raise Refused(f"a query is a text of 1 to {MAX_TEXT} letters")
        (answer,) = await self.run(lambda: self.searcher.texts([text], TOP, rerank))
        return JSONResponse(as_json(answer, printable))

    async def similar(self, request: Request) -> Response:
        """A picture's bytes -> pictures like it."""
        image = decode(await read_body(request, MAX_UPLOAD), self.searcher.store)
        hits = await self.run(lambda: self.searcher.image(image, TOP))
        return JSONResponse({"contrast": [hit_json(hit, printable) for hit in hits], "reranked": [], "matches": None})

    async def picture(self, request: Request) -> Response:
        """/picture/NUMBER/small|large as a JPEG that is made here."""
        number, size = request.path_params["number"], SIZES.get(request.path_params["size"])
        if size is None or not 0 <= number < len(self.searcher.entries):
            return PlainTextResponse("not found", 404)

        def make() -> bytes:
            image = self.searcher.store.load(self.searcher.entries[number].name)
            image.thumbnail((size, size), Image.Resampling.LANCZOS)
            return encoded(image, "JPEG")

        try:
            return Response(await anyio.to_thread.run_sync(make), media_type="image/jpeg")
        except (ValueError, OSError):
            return PlainTextResponse("this picture cannot be read any more: update the index", 404)

    async def heatmap(self, request: Request) -> Response:
        """{"number": ..., "text": ...} -> a PNG of where matching looks for each word."""
        values = await read_json(request)
        number, text = values.get("number"), values.get("text")
        if not isinstance(number, int) or not 0 <= number < len(self.searcher.entries) or not isinstance(text, str):
            raise Refused("a heatmap needs the number of a picture and a text")
        require_text(text)

        def make() -> bytes:
            image, blip = self.searcher.store.load(self.searcher.entries[number].name), self.searcher.blip
            found = blip.heatmap(image, text[:MAX_TEXT])
            return encoded(draw_heatmap(seen_by_model(image, blip.model.image_size), found), "PNG")

        return Response(await self.run(make), media_type="image/png")


def create_app(searcher: Searcher, hosts: frozenset[str], token: str = "") -> Starlette:
    """The page as an ASGI application; `hosts`: what the Host header may be, in lower case."""
    page = Page(searcher)
    routes = [
        Route("/", page.home), Route("/favicon.ico", page.icon), Route("/static/{name}", page.static),
        Route("/search", page.search, methods=["POST"]), Route("/similar", page.similar, methods=["POST"]),
        Route("/picture/{number:int}/{size}", page.picture), Route("/heatmap", page.heatmap, methods=["POST"]),
    ]  # fmt: skip
    handlers: dict[Any, Any] = {
        Busy: lambda request, error: JSONResponse({"error": "too many queries at once: try again"}, 503),
        Refused: lambda request, error: JSONResponse({"error": str(error)}, 400),
        ValueError: lambda request, error: JSONResponse({"error": str(error)}, 400),
    }
    guard = Middleware(Guard, hosts=hosts, token=token)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


def serve(searcher: Searcher, host: str, port: int) -> None:
    """Serve until Ctrl-C; prints the address."""
    local = host in ("127.0.0.1", "localhost", "::1")
    token = "" if local else secrets.token_urlsafe(24)
    shown = platform.node() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    hosts = known_hosts(host, port)
    print(f"http://{shown}:{port}/{f'?token={token}' if token else ''}", flush=True)
    if host in ("0.0.0.0", "::"):
        print(f"in place of {shown}:{port}, these work too: {', '.join(sorted(hosts))}", flush=True)
    app = create_app(searcher, hosts, token)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


def known_hosts(host: str, port: int) -> frozenset[str]:
    """What a browser may send as Host, in lower case: names and addresses of this machine that `host` is reached by."""
    names = {"127.0.0.1", "localhost", "::1", host} - {"0.0.0.0", "::"}
    if host in ("0.0.0.0", "::"):
        names |= {platform.node(), *own_addresses()}
    bracketed = {f"[{name}]" if ":" in name else name for name in map(str.lower, names)}
    return frozenset(f"{name}:{port}" for name in bracketed) | (bracketed if port == 80 else frozenset())


def own_addresses() -> set[str]:
    """Addresses of this machine: those of its name, and those that its packets to elsewhere come from."""
    found = {source_address(socket.AF_INET, "192.0.2.1"), source_address(socket.AF_INET6, "2001:db8::1")}
    with suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(platform.node(), None)}
    return found - {""}


def source_address(family: socket.AddressFamily, other: str) -> str:
    """The address that packets to `other` would come from, '' where no route leads there. Nothing is sent."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])
    return ""


# ---- what comes in, and goes out ------------------------------------------------------------------------------------


async def read_body(request: Request, most: int) -> bytes:
    """The body, at most `most` bytes of it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(f"too large: {most >> 20} MB at most")
    return bytes(body)


async def read_json(request: Request) -> dict[str, Any]:
    """An object of JSON; its content type is one that no form of another page can send."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused("the content type must be application/json")
    try:
        values = json.loads(await read_body(request, 64 << 10))
    except (ValueError, RecursionError):
        raise Refused("the body is not valid JSON") from None
    if not isinstance(values, dict):
        raise Refused("the body must be an object")
    return values


def decode(data: bytes, store: ImageStore) -> Image.Image:
    """An uploaded picture in RGB, as those of `store`; Refused before it is decoded if it has too many pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                most = MAX_PIXELS // 10**6
                raise Refused(f"{image.width} x {image.height} pixels are too many: {most} megapixels at most")
            return store.as_rgb(image)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused("this is not a picture, or one of an unknown format") from None
    except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
        raise Refused(f"this is not a picture, or a broken one: {str(error) or type(error).__name__}") from None


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
