"""Measures of captions: equal to direct calls of COCO's code, and none of its traps is left."""

import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import report
import train_retrieval
from checkpoints.weights import weights_sha256
from models import load
from reports.captions import GALLERIES, caption_table, from_test
from retrieval import captions
from retrieval.captions import MEASURES, SPICE_JARS, caption_scores, clean, score
from retrieval.rankings import keep
from tests.test_pictures import save_run_folder
from tests.test_rankings import random_ranking
from tests.test_train import ROOT, lines, run

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java: apt-get install default-jre-headless")
RES = ["a man rides a red horse", "two dogs play in the snow", "a cat on a table"]
GTS = [
    ["a man in red rides a horse", "somebody rides a horse"], ["two dogs are playing with snow", "dogs in the snow"],
    ["a bus in the street", "a red bus"],
]  # fmt: skip


def by_number(texts) -> dict:
    return {number: [text] if isinstance(text, str) else text for number, text in enumerate(texts)}


@needs_java
def test_equal_direct_calls_of_cocos_code(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", captions.JAVA)
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    found = caption_scores(RES, GTS)
    assert list(found) == list(MEASURES)
    res, gts = by_number(RES), by_number(GTS)  # lower case without punctuation: tokenising changes nothing
    for name, measure in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        assert found[name] == pytest.approx(100 * measure.compute_score(gts, res)[0])
    one = sum(min(res[0][0].split().count(w), max(t.split().count(w) for t in gts[0])) for w in set(res[0][0].split()))
    assert caption_scores(RES[:1], GTS[:1])["BLEU-1"] == pytest.approx(100 * one / 6 * math.exp(1 - 7 / 6))
    assert score(res, gts, spice=False) == pytest.approx(found)


@needs_java
def test_texts_that_made_meteor_wait_for_ever(monkeypatch):
    """A newline, METEOR's separator, control characters, nothing at all; and a locale with decimal commas."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    odd = ["a man\nrides ||| a horse", "", "tab\there \u2028 \x00 null", "…!"]
    found = caption_scores(odd, [["a man rides a horse"], ["."], ["tab here null ||| x\r\ny"], ["dots"]], timeout=120)
    assert 0 < found["METEOR"] < 100


def test_clean():
    assert clean("a\n b |||c\t\x00d\u2028e ") == "a b c d e" and clean(" \n") == "."


def test_without_java_there_is_one_sentence_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert report.main(["captions", str(tmp_path), "--gallery", "test"]) == 2
    error = capsys.readouterr().err
    assert "need Java" in error and "default-jre-headless" in error and error.count("\n") == 1


def test_spice_names_its_jars_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(captions, "spice_folder", lambda: tmp_path)
    (tmp_path / SPICE_JARS[0]).touch()
    with pytest.raises(ValueError, match=f"{' and '.join(SPICE_JARS)} in .*, and {SPICE_JARS[1]} is not there"):
        caption_scores(RES, GTS, spice=True)


def processes_with(word: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if word in line and " ps " not in line]


@needs_java
def test_a_child_that_hangs_is_ended_with_all_it_started(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexec sleep 4242\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="took more than 6 s, and were ended"):
        caption_scores(RES, GTS, timeout=6)
    time.sleep(0.2)
    assert processes_with("sleep 4242") == []


@needs_java
def test_the_child_ends_with_its_parent(tmp_path):
    """Killed without a chance to tidy up."""
    (tmp_path / "java").write_text("#!/bin/sh\nexec sleep 4343\n")
    (tmp_path / "java").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    code = f"from retrieval.captions import caption_scores; caption_scores({RES!r}, {GTS!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not processes_with("sleep 4343") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with("sleep 4343")
    parent.kill()
    parent.wait()
    while processes_with("sleep 4343") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with("sleep 4343") == []


def test_the_first_text_of_the_ranking_is_the_caption():
    ranking, table = random_ranking(6)
    kept = keep(ranking, table, "test")
    found = from_test(kept)
    assert len(found.candidates) == kept.txt.asked.sum() == len(found.references)
    for number, image in enumerate(np.flatnonzero(kept.txt.asked)):
        assert found.candidates[number] == table.captions[kept.txt.itm.best[image, 0]]
        assert found.hit[number] == (found.candidates[number] in found.references[number])


def test_a_measurement_names_the_weights_that_chose_the_texts(tiny_run, monkeypatch):
    """Those of the kept rankings for texts of the test split, those of the folder for texts of the training set."""
    folder = save_run_folder(tiny_run)
    args = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(folder), "--device", "cpu"]
    assert train_retrieval.main([*args, "--evaluate", "--random_weights"]) == 0
    monkeypatch.setattr("reports.captions.require_java", lambda spice: None)
    monkeypatch.setattr("reports.captions.caption_scores", lambda *_, spice: dict.fromkeys(MEASURES, 1.0))
    for gallery in GALLERIES:
        caption_table(folder, gallery)
    (evaluated,) = lines(folder / "evaluate.txt")
    named = {row["gallery"]: row["checkpoint_sha256"] for row in lines(folder / "captions.txt")}
    assert named == {"test": evaluated["checkpoint_sha256"], "train": weights_sha256(load(folder).model)}
    assert named["test"] != named["train"]


@needs_java
@pytest.mark.slow
def test_a_run_is_measured_with_both_galleries(tiny_run, capsys):
    assert run(tiny_run) == 0
    for gallery in ("test", "train"):
        assert report.main(["captions", str(tiny_run / "out"), "--gallery", gallery]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split()[:4] == ["texts", "of", gallery, "images"] and printed[1].split()[:2] == ["all", "4"]
    rows = lines(tiny_run / "out" / "captions.txt")
    assert [row["gallery"] for row in rows] == ["test", "train"] and 0 <= rows[0]["all_BLEU-4"] <= 100
    assert ("misses_CIDEr" in rows[0]) or ("hits_CIDEr" in rows[0])
    assert not any(key.startswith(("hits", "misses")) for key in rows[1])
