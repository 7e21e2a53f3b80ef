"""The page of an index: what it answers, and what it refuses."""

import io
import json
import platform
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import ImageStore
from models import load
from reports import serve
from reports.hits import write_page
from reports.serve import COOKIE, HEADERS, OneAtATime, create_app, decode
from retrieval.index import IndexFolder
from retrieval.indexing import update_index
from retrieval.search import Searcher, as_json
from tests.conftest import tiny_med, tiny_model
from tests.test_images import deep, png_stating
from tests.test_index import new_index, picture, some_pictures

TestClient = pytest.importorskip("starlette.testclient", reason="pip install -r requirements-search.txt").TestClient
HOST = "127.0.0.1:8000"
LONG = "long" * 30
EVIL = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'<"


@pytest.fixture(scope="module")
def searcher(tmp_path_factory) -> Searcher:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(3)
    torch.save({"model": tiny_model(med_config=tiny_med(), image_size=32).state_dict()}, folder / "w.pth")
    root = some_pictures(folder / "pictures", 7)
    picture(50).save(root / f"{EVIL} {LONG}.png")
    blip = load(folder / "w.pth")
    index = new_index(folder / "index", root)
    index.head.checkpoint = str(folder / "w.pth")
    update_index(index, blip)
    return Searcher(index, blip)


@pytest.fixture
def client(searcher):
    return TestClient(create_app(searcher, frozenset({HOST})), base_url=f"http://{HOST}")


def ask(client, **values):
    return client.post("/search", json=values)


def png(side: int = 40, seed: int = 3) -> bytes:
    buffer = io.BytesIO()
    picture(seed, side).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_page_answers_as_the_program_does(client, searcher, capsys):
    page = client.get("/")
    assert page.status_code == 200 and "8 pictures of" in page.text
    for name, value in HEADERS.items():
        assert page.headers[name] == value
    first, second = ask(client, text="a red dog").json(), ask(client, text="a red dog", rerank=True).json()
    (plain,) = searcher.texts(["a red dog"], serve.TOP)
    (reranked,) = searcher.texts(["a red dog"], serve.TOP, serve.RERANK)
    assert [hit["number"] for hit in first["contrast"]] == [hit.number for hit in plain.contrast]
    assert first["reranked"] == [] and first["matches"] is None
    expected = json.loads(json.dumps(as_json(reranked)))
    assert second["reranked"] == expected["reranked"] and second["matches"] == expected["matches"]
    found = client.post("/similar", content=png(seed=3), headers={"content-type": "application/octet-stream"}).json()
    assert found["contrast"][0]["path"] == "3.png" and found["contrast"][0]["cosine"] > 0.999


def test_pictures_go_out_by_number_and_made_anew(client, searcher):
    answer = client.get("/picture/2/small")
    image = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/jpeg" and image.format == "JPEG" and image.size == (44, 40)
    paths = [
        "/picture/99/small", "/picture/-1/small", "/picture/2/huge", "/picture/../small", "/picture/2.png/small",
        "/picture/%2e%2e%2f%2e%2e%2fetc%2fpasswd/small", "/static/../search.html", "/static/%2e%2e%2fserve.py",
        "/static/search.html", "/index.json",
    ]  # fmt: skip
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 404 and b"root:" not in answer.content and b"import" not in answer.content
    for name in ("search.js", "search.css"):
        assert client.get(f"/static/{name}").status_code == 200


def test_heatmaps_of_a_hit(client):
    answer = client.post("/heatmap", json={"number": 1, "text": "a red dog"})
    assert Image.open(io.BytesIO(answer.content)).width > 300
    assert client.post("/heatmap", json={"number": 1, "text": "..."}).status_code == 400
    assert client.post("/heatmap", json={"number": 99, "text": "a dog"}).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:9", "localhost", "", "127.0.0.1:8000.evil.example"])
def test_foreign_hosts_are_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("headers", [
    {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "https://127.0.0.1:8000"},
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
])  # fmt: skip
def test_posts_of_other_origins_are_refused(client, headers):
    answer = client.post("/search", json={"text": "a dog"}, headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    own = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    assert client.post("/search", json={"text": "a dog"}, headers=own).status_code == 200


def test_a_form_of_another_page_cannot_ask(client):
    """Without an Origin: the content type is one that needs no leave of the server."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post("/search", content='{"text": "a dog"}', headers={"content-type": kind})
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]


@pytest.mark.parametrize("body", ["", "{", "[]", '{"text": 3}', '{"text": " "}', '{"text": "%s"}' % ("a" * 1001),
                                  "[" * 100000, '{"text": "\\ud800 dog"}'])  # fmt: skip
def test_bad_bodies_are_explained(client, body):
    answer = client.post("/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]


def test_uploads_are_bounded_in_bytes_and_pixels(client, searcher, monkeypatch):
    bomb, whole, floats = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")  # 81 million pixels in 10 kB
    picture(1, 64).save(whole, "JPEG")
    Image.new("F", (8, 8)).save(floats, "TIFF")
    for data, said in ((bomb.getvalue(), "9000 x 9000 pixels are too many"), (b"<script>", "not a picture"),
                       (whole.getvalue()[:700], "not a picture, or a broken one"), (b"", "not a picture"),
                       (floats.getvalue(), "floating-point pixels")):  # fmt: skip
        answer = client.post("/similar", content=data)
        assert answer.status_code == 400 and said in answer.json()["error"]
    monkeypatch.setattr(serve, "MAX_UPLOAD", 1000)
    answer = client.post("/similar", content=b"x" * 2000)
    assert answer.status_code == 400 and "too large" in answer.json()["error"]
    assert decode(whole.getvalue(), searcher.store).size == (68, 64)


def test_an_upload_has_the_pixels_of_the_file_in_the_index(tmp_path):
    """Also where the file says more than its pixels: which way is up, how many of the bits mean something."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "states.png").write_bytes(png_stating(12, deep(12)))
    Image.fromarray(deep(12)).save(tmp_path / "states.tif", tiffinfo={281: 4095})
    store = ImageStore(tmp_path, upright=True)
    for name in ("turned.jpg", "states.png", "states.tif"):
        image = decode((tmp_path / name).read_bytes(), store)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(store.load(name)))


def test_hosts_that_a_browser_sends():
    assert {"127.0.0.1:8000", "localhost:8000", "[::1]:8000"} <= serve.known_hosts("127.0.0.1", 8000)
    assert "localhost" in serve.known_hosts("127.0.0.1", 80) and "localhost" not in serve.known_hosts("127.0.0.1", 81)
    assert "[fe80::2]:8000" in serve.known_hosts("fe80::2", 8000)
    everywhere = serve.known_hosts("0.0.0.0", 8000)
    assert f"{platform.node().lower()}:8000" in everywhere and "0.0.0.0:8000" not in everywhere


def test_a_machine_is_reached_by_its_name_in_any_case_and_by_its_addresses(searcher, monkeypatch):
    assert serve.source_address(socket.AF_INET, "127.0.0.1") == "127.0.0.1"
    monkeypatch.setattr(platform, "node", lambda: "MyBox")
    monkeypatch.setattr(serve, "own_addresses", lambda: {"192.168.1.5", "fd00::5"})
    hosts = serve.known_hosts("0.0.0.0", 8000)
    assert hosts - serve.known_hosts("127.0.0.1", 8000) == {"mybox:8000", "192.168.1.5:8000", "[fd00::5]:8000"}
    client = TestClient(create_app(searcher, hosts), base_url="http://mybox:8000")
    for host in ("mybox:8000", "MyBox:8000"):  # browsers send the first
        own = {"host": host, "origin": f"http://{host}"}
        assert client.post("/search", json={"text": "a dog"}, headers=own).status_code == 200
    refused = client.get("/", headers={"host": "other:8000"})
    assert refused.status_code == 421 and "mybox" not in refused.text  # nobody has shown a token yet
    assert "an address that search.py printed, or start with --host" in refused.text


def test_another_host_needs_the_token(searcher):
    client = TestClient(create_app(searcher, frozenset({HOST}), "secret"), base_url=f"http://{HOST}")
    assert client.get("/").status_code == 403 and ask(client, text="a dog").status_code == 403
    assert (
        client.get("/?token=wrong").status_code == 403
        and client.get("/picture/1/small?token=secret").status_code == 403
    )
    answer = client.get("/?token=secret", follow_redirects=False)
    assert answer.status_code == 303 and "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=strict" in answer.headers["set-cookie"] and client.cookies[COOKIE] == "secret"
    assert client.get("/").status_code == 200 and ask(client, text="a dog").status_code == 200


def test_queries_take_turns_and_a_long_queue_is_refused(searcher, monkeypatch):
    inside, most, original = 0, 0, Searcher.texts

    def slow(self, *args):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        found = original(self, *args)
        inside -= 1
        return found

    monkeypatch.setattr(Searcher, "texts", slow)
    app = create_app(searcher, frozenset({HOST}))
    with TestClient(app, base_url=f"http://{HOST}") as client, ThreadPoolExecutor(30) as pool:
        codes = [answer.status_code for answer in pool.map(lambda i: ask(client, text=f"a dog {i}"), range(30))]
    assert most == 1 and set(codes) == {200, 503} and codes.count(200) >= serve.WAITING + 1
    with TestClient(app, base_url=f"http://{HOST}") as client, ThreadPoolExecutor(8) as pool:
        assert {a.status_code for a in pool.map(lambda i: ask(client, text=f"a cat {i}"), range(8))} == {200}
    turns = OneAtATime(0)
    with turns.turn(), pytest.raises(serve.Busy), turns.turn():
        pass


def test_the_page_of_hits_is_whole_and_inert(searcher, tmp_path):
    answers = searcher.texts([EVIL], 8, 4)
    page = write_page(searcher, answers, tmp_path / "h.html").read_text(encoding="utf-8")
    assert "<script" not in page and "onerror=document" in page and "<img src=x" not in page
    assert page.count("data:image/jpeg") == 8 + 4 and not re.search(r'(?:src|href)="(?!data:)', page)


@pytest.fixture
def address(searcher):
    """The page, served to a browser."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(searcher, frozenset({f"127.0.0.1:{port}"}))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(50):
        if server.started:
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


def search_for(page, words: str) -> None:
    """Type a query into the page as it opens, and wait for the re-ranked hits."""
    from playwright.sync_api import expect

    page.keyboard.type(words)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("re-ranked by matching|nothing matches"), timeout=30000)


def test_in_a_browser(phone, address):
    """Typed, answered, enlarged with a heatmap; markup in names and queries stays text; nothing else is asked for."""
    from playwright.sync_api import expect

    asked, said = [], []
    phone.on("request", lambda request: asked.append(request.url))
    phone.on("console", lambda message: said.append(message.text))
    phone.goto(address)
    search_for(phone, f"a red dog {EVIL}")
    assert phone.locator("#hits li").count() == 8 and "P(match)" in phone.inner_text("#hits li")
    assert EVIL in phone.inner_text("#hits") and phone.title() == "Picture search"
    phone.locator("#hits button").first.press("Enter")
    phone.click("#heat")
    expect(phone.locator("#map")).to_be_visible(timeout=30000)
    phone.keyboard.press("Escape")
    phone.set_input_files("#file", files=[{"name": "q.png", "mimeType": "image/png", "buffer": png(seed=2)}])
    expect(phone.locator("#status")).to_have_text("pictures like it, by contrast", timeout=30000)
    assert "2.png" in phone.locator("#hits li").first.inner_text()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(url.startswith((address, "blob:")) for url in asked) and said == []


def test_a_map_is_of_the_hit_that_is_open(phone, address):
    """One that comes late is left; it is asked for with the words that found the hit; a refusal is seen."""
    from playwright.sync_api import expect

    phone.goto(address)
    search_for(phone, "a red dog")
    phone.route("**/search", lambda route: None)  # the next query gets no answer
    phone.fill("#text", "a blue cat")
    phone.press("#text", "Enter")
    held = []
    phone.route("**/heatmap", lambda route: held.append(route))
    for number in (0, 1):
        phone.locator("#hits button").nth(number).click()
        with phone.expect_request("**/heatmap") as request:
            phone.click("#heat")
        assert request.value.post_data_json["text"] == "a red dog"
        if number == 0:
            phone.keyboard.press("Escape")
    with phone.expect_response("**/heatmap"):
        held[0].fulfill(body=png(), content_type="image/png")
    phone.wait_for_timeout(300)
    assert not phone.locator("#map").is_visible()
    held[1].fulfill(status=400, json={"error": "has no words"})
    expect(phone.locator("dialog #trouble")).to_have_text("has no words")
    expect(phone.locator("dialog #trouble")).to_be_visible()


def test_long_names_and_queries_stay_within_a_narrow_window(phone, address, searcher, tmp_path):
    phone.goto(address)
    search_for(phone, "a red dog")
    phone.locator("#hits button", has_text=LONG).click()
    assert phone.evaluate("document.getElementById('name').scrollWidth <= document.getElementById('name').clientWidth")
    phone.goto(write_page(searcher, searcher.texts([LONG], 2, 0), tmp_path / "h.html").as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_index_of_the_fixture_is_open(searcher):
    assert isinstance(searcher.index, IndexFolder) and np.isfinite(searcher.index.head.threshold)
    assert Path(searcher.index.head.root).is_dir()
