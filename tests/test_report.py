"""The page about a run: its numbers are those of the run, it is safe and whole, and a part of a run gives a part."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

import report
import train_retrieval
from data.annotations import Annotations
from reports.cases import choose_groups, compare, false_negatives, outcomes
from reports.report import MOST_BYTES, by_length
from retrieval.rankings import keep, load_rankings, rankings_file, save_rankings
from retrieval.rerank import Ranking, Shortlists
from tests.conftest import WORDS, make_tiny_run
from tests.test_rankings import random_ranking
from tests.test_statistics import rankings_of
from tests.test_train import ROOT, lines, run

EVIL = "<script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A trained run of two epochs, one of whose test captions is markup."""
    folder = make_tiny_run(tmp_path_factory.mktemp("report"))
    rows = json.loads((folder / "test.json").read_text())
    rows[0]["caption"][0] = EVIL
    (folder / "test.json").write_text(json.dumps(rows))
    assert run(folder, "--set", "log_every=1") == 0
    return folder / "out"


def page_of(run_folder: Path, tmp_path: Path, *args: str) -> str:
    assert report.main([str(run_folder), "-o", str(tmp_path / "r.html"), *args]) == 0
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def test_numbers_of_the_page_are_those_of_the_log(finished, tmp_path):
    page, test = page_of(finished, tmp_path), lines(finished / "log.txt")[-1]
    cells = dict(re.findall(r'<td data-key="([^"]+)">([\d.]+)', page))
    assert len(cells) == 3 * 7
    for title, prefix in (("re-ranked", ""), ("contrast", "itc_"), ("chance", "chance_")):
        for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean"):
            assert float(cells[f"{title} {key}"]) == pytest.approx(test[f"test_{prefix}{key}"], abs=0.006)
    assert test["checkpoint_sha256"] in page and "loss_ita" in page and page.count("<h2>") >= 7


def test_the_page_is_whole_and_safe(finished, tmp_path):
    page = page_of(finished, tmp_path)
    assert len(page.encode()) < MOST_BYTES
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is fetched
    assert "&lt;script&gt;" in page  # the caption is shown as text
    pictures = re.findall(r'<image id="p(\d+)" href="(data:[^"]+)"', page)
    assert len(pictures) == len({data for _, data in pictures}) == 4  # each image once
    assert {number for number in re.findall(r'<use href="#p(\d+)"', page)} <= {number for number, _ in pictures}


@pytest.mark.parametrize(
    "kept", [["log.txt", "steps.jsonl", "config.yaml"], ["ranking_test.npz"], ["ranking_val.npz", "log.txt"]]
)
def test_a_part_of_a_run_gives_a_part_of_the_page(finished, tmp_path, kept):
    (tmp_path / "run").mkdir()
    for name in kept:
        shutil.copy(finished / name, tmp_path / "run" / name)
    page = page_of(tmp_path / "run", tmp_path)
    assert ("no kept rankings yet" in page) == ("ranking" not in " ".join(kept))
    assert ("<h2>Training</h2>" in page) == ("log.txt" in kept)
    assert ('class="gone"' in page) == ("config.yaml" not in kept)  # without a config, names stand for pictures


def test_heatmaps_of_the_misses_that_are_shown(finished, tmp_path, capsys, caplog):
    plain = page_of(finished, tmp_path)
    page = page_of(finished, tmp_path, "--heatmaps", "--cases", "2")
    maps = re.findall(r'<figure><img src="data:image/jpeg;base64,[^"]+" alt="map of ([^"]+)"', page)
    assert "map of" not in plain and set(maps) & set(WORDS) and len(maps) > 5
    (tmp_path / "moved").mkdir()
    for path in finished.glob("ranking_test.npz"):
        shutil.copy(path, tmp_path / "moved")
    assert report.main([str(tmp_path / "moved"), "--heatmaps"]) == 2
    assert "heatmaps need the pictures" in capsys.readouterr().err
    assert "config.yaml is not there" in caplog.text and "--config" not in caplog.text  # which report.py has not


def evaluated(folder: Path, config: Path, checkpoint: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(folder), "--device", "cpu", "--evaluate"]
    assert train_retrieval.main([*args, "--checkpoint", str(checkpoint)]) == 0


def test_the_folder_of_an_evaluation_has_pictures(finished, tmp_path):
    evaluated(tmp_path / "mine", finished.parent / "config.yaml", finished / "checkpoint_best.pth")
    page = page_of(tmp_path / "mine", tmp_path)
    assert page.count('<image id="p') == 4 and 'class="gone"' not in page


def test_heatmaps_of_other_weights_than_those_evaluated_are_refused(finished, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other.pth"
    shutil.copytree(finished, folder)
    file = torch.load(finished / "checkpoint_best.pth", weights_only=True)
    file["model"]["vision_proj.bias"] += 1
    torch.save(file, other)
    evaluated(folder, folder / "config.yaml", other)
    assert report.main([str(folder), "--heatmaps"]) == 2
    err = capsys.readouterr().err
    assert f"ranking_test.npz: what was evaluated is {other}" in err and "leave out --heatmaps" in err
    assert not (folder / "report.html").exists() and "map of" not in page_of(folder, tmp_path)
    kept = load_rankings(rankings_file(folder, "test"))
    save_rankings(folder, kept, {key: value for key, value in kept.row.items() if key != "checkpoint_sha256"})
    assert "map of" in page_of(folder, tmp_path, "--heatmaps", "--cases", "1")  # a file of before says nothing


def test_a_run_against_itself_shows_no_difference(finished, tmp_path):
    page = page_of(finished, tmp_path, "--against", str(finished))
    assert "no difference shown" in page and "differs by +0.00 points" in page
    row = re.search(r'<table class="against">.*?<tbody><tr>(.*?)</tr>', page, re.DOTALL)[1]
    assert re.findall(r"<td>([^<]+)</td>", row)[1:3] == ["0", "0"] and row.endswith("<td>1</td>")


def test_a_difference_is_shown_in_words(tmp_path):
    rng, right = np.random.default_rng(0), np.arange(60)[:, None] == np.arange(180)[None] // 3
    noise = rng.standard_normal((60, 180))
    for name, strength in (("worse", 1.0), ("better", 3.0)):
        scores = noise + strength * right
        save_rankings(tmp_path / name, rankings_of(scores, scores.T, 3), {"kind": "evaluate"})
    page = page_of(tmp_path / "better", tmp_path, "--against", str(tmp_path / "worse"))
    assert re.search(r"r_mean higher by \d+\.\d\d points: a difference is shown", page)
    assert "lower by" in page_of(tmp_path / "worse", tmp_path, "--against", str(tmp_path / "better"))


def test_other_galleries_are_not_compared(tmp_path, capsys):
    for seed, name in ((0, "a"), (1, "b")):
        ranking, table = random_ranking(seed)
        if name == "b":
            table.captions[0] = "another caption"
        save_rankings(tmp_path / name, keep(ranking, table, "test"), {})
    assert report.main([str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 2
    assert "evaluated on different galleries" in capsys.readouterr().err
    assert not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize("way", ["txt", "img"])
def test_every_query_has_one_outcome_and_groups_hold_what_they_say(way):
    ranking, table = random_ranking(5)
    kept = keep(ranking, table, "test")
    masks = outcomes(kept, way)
    np.testing.assert_array_equal(sum(mask.astype(int) for mask in masks.values()), kept.direction(way).asked)
    groups = {group.title: group for group in choose_groups(kept, way, 4)}
    assert groups["Saved by re-ranking"].count == masks["saved"].sum()
    assert groups["Hits"].count == (masks["right"] | masks["saved"]).sum()
    assert all(shown.place == 1 and shown.found[0].right for shown in groups["Hits"].cases)
    assert all(shown.place is None or shown.place > 1 for shown in groups["Worst misses"].cases)
    assert all(shown.place_itc == 1 != shown.place for shown in groups["Lost by re-ranking"].cases)
    assert choose_groups(kept, way, 4) == choose_groups(kept, way, 4)
    masks = compare(kept, kept, way)
    assert masks["won"].sum() == masks["lost"].sum() == 0
    assert (masks["both"] | masks["neither"]).sum() == kept.direction(way).asked.sum()


def test_captions_of_any_length_are_counted():
    ranking, table = random_ranking(7)
    table.captions[0] = "word " * 40
    table.captions[1] = "word " * 30
    kept = keep(ranking, table, "test")
    rows = by_length(kept)
    assert [row[:2] for row in rows[1:]] == [("16 to 30", 1), ("more than 30", 1)]
    assert sum(row[1] for row in rows) == kept.img.asked.sum()


def test_equal_words_on_another_image_are_false_negatives():
    """Two images share a caption; for either, the other's stands first."""
    scores = np.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    kept = rankings_of(scores, scores.T, 1)
    table = Annotations(
        "custom test",
        [ROOT / "rows.json"],
        kept.images,
        kept.image_ids,
        ["a dog", "a dog", "a cat"],
        kept.caption_image,
    )

    lists = Shortlists(kept.txt.itm.best[:, :3], scores[np.arange(3)[:, None], kept.txt.itm.best[:, :3]],
                       kept.img.itm.best[:, :3], scores.T[np.arange(3)[:, None], kept.img.itm.best[:, :3]])  # fmt: skip
    kept = keep(Ranking(lists, lists, 0), table, "test")
    assert false_negatives(kept, "txt") == false_negatives(kept, "img") == 2
    worst = choose_groups(kept, "img", 3)[0]
    assert worst.count == 2 and all(shown.found[0].same_words for shown in worst.cases)


def test_curves_of_several_runs(finished, tmp_path, capsys):
    for name in ("c.svg", "c.png"):
        assert report.main(["curves", str(finished), str(finished), "-o", str(tmp_path / name)]) == 0
    svg = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert "temperature" in svg and (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "c.svg").read_bytes()
    assert report.main(["curves", str(finished), str(finished), "-o", str(tmp_path / "c.svg")]) == 0
    assert (tmp_path / "c.svg").read_bytes() == before
    capsys.readouterr()
    for args, said in (
        (["curves", str(finished), "-o", str(tmp_path / "c.pdf")], "ends in .svg or .png"),
        (["curves", str(tmp_path), "-o", str(tmp_path / "c.svg")], "no curves"),
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path)], "nothing to report"),
        ([str(finished), "--against", str(tmp_path)], "there are no kept rankings"),
    ):
        assert report.main(args) == 2
        assert said in capsys.readouterr().err


def test_without_matplotlib_there_is_one_clear_sentence(finished, monkeypatch, capsys):
    for name in ("matplotlib", "reports.curves", "reports.report"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert report.main(["curves", str(finished), "-o", "c.svg"]) == 2
    assert "pip install -r requirements-report.txt" in capsys.readouterr().err


def test_markup_in_a_caption_is_inert_in_a_browser(finished, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium (apt-get install chromium)")
    page_of(finished, tmp_path)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
               f"file://{tmp_path / 'r.html'}"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = unescape(re.search(r"<title>(.*?)</title>", shown)[1])
    assert title == "out: report" and "onerror" in unescape(shown) and "<img" not in shown


def test_long_names_of_runs_stay_within_a_narrow_window(finished, tmp_path, phone):
    folder = tmp_path / ("long" * 30)
    shutil.copytree(finished, folder)
    page_of(folder, tmp_path, "--against", str(folder))
    phone.goto((tmp_path / "r.html").as_uri())
    titles = "[...document.querySelectorAll('h1, h2')]"
    assert phone.evaluate(f"{titles}.filter(title => title.innerText.includes('longlong')).length") == 2
    assert phone.evaluate(f"{titles}.every(title => title.scrollWidth <= title.clientWidth)")


def test_rankings_of_the_run_are_what_the_page_reads(finished):
    kept = load_rankings(rankings_file(finished, "test"))
    assert kept.row["kind"] == "test" and len(kept.images) == 4
