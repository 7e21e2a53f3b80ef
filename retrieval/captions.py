"""Measures of captions, BLEU to CIDEr, by COCO's own code (pycocoevalcap), in a child process that cannot hang.

Sources: Chen et al. 2015 (COCO captions: the measures); Devlin et al. 2015 (nearest-neighbour captions as a baseline).
What breaks there and is kept away here: METEOR waits for ever on a newline or `|||` in a text, and under a locale whose
decimals have commas; without Java an unrelated AttributeError hides the cause. The tokenizer and SPICE run Java too.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

MEASURES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
JAVA = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
TIMEOUT = 3600.0  # seconds of a child
REPOSITORY = Path(__file__).resolve().parents[1]  # not from utils: the child should not wait for torch


def require_java(spice: bool = False) -> None:
    """ValueError where the measures cannot run: without Java or, for SPICE, without its two jars."""
    if not shutil.which("java"):
        raise ValueError(
            "BLEU, METEOR, ROUGE-L and CIDEr need Java, which COCO's tokenizer and METEOR are written in: install it "
            "(Debian, Ubuntu: apt-get install default-jre-headless)"
        )
    folder = spice_folder()
    lacking = [jar for jar in SPICE_JARS if not (folder / jar).exists()]
    if spice and lacking:
        raise ValueError(
            f"SPICE needs {' and '.join(SPICE_JARS)} in {folder}, and {' and '.join(lacking)} is not there. Nothing is "
            "downloaded: they are part of Stanford CoreNLP 3.6.0 (https://nlp.stanford.edu/software)"
        )


def spice_folder() -> Path:
    """Where SPICE looks for its jars."""
    spec = find_spec("pycocoevalcap")
    assert spec and spec.submodule_search_locations, "a requirement of this program"
    return Path(list(spec.submodule_search_locations)[0]) / "spice" / "lib"


def clean(text: str) -> str:
    """One line without control characters and without METEOR's separator; never empty."""
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text).replace("|||", " ")).strip() or "."


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False, timeout: float = TIMEOUT
) -> dict[str, float]:
    """The measures in percent (CIDEr times 100) of one candidate an image against its references.

    ValueError without Java or within `timeout` seconds; the child and whatever it has started end with this process.
    """
    require_java(spice)
    assert len(candidates) == len(references) > 0
    with tempfile.TemporaryDirectory() as folder:
        job, result, errors = (Path(folder, name) for name in ("job.json", "result.json", "errors.txt"))
        res, gts = [clean(text) for text in candidates], [[clean(text) for text in texts] for texts in references]
        job.write_text(json.dumps({"res": res, "gts": gts, "spice": spice}), encoding="utf-8")
        _run_child([str(job), str(result), str(os.getpid())], timeout, errors)
        if not result.exists():
            last = " ".join(errors.read_text(encoding="utf-8", errors="replace").split())[-600:]
            raise ValueError(f"the measures of captions ended without a result: {last}")
        return json.loads(result.read_text(encoding="utf-8"))


def _run_child(args: list[str], timeout: float, errors: Path) -> None:
    env = os.environ | {"JAVA_TOOL_OPTIONS": JAVA, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-m", "retrieval.captions", *args]
    with open(errors, "wb") as file:
        child = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the measures of captions took more than {timeout:.0f} s, and were ended") from None
    finally:
        _end_group(child.pid)
        child.wait()


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended
        pass


# ---- child ----------------------------------------------------------------------------------------------------------


def score(candidates: Mapping[int, list[str]], references: Mapping[int, list[str]], spice: bool) -> dict[str, float]:
    """What the child computes, of texts by image: tokenised as COCO does, then each measure by itself."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenised(texts: Mapping[int, list[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({key: [{"caption": text} for text in list_] for key, list_ in texts.items()})

    res, gts = tokenised(candidates), tokenised(references)
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    values = [*bleu, Meteor().compute_score(gts, res)[0], Rouge().compute_score(gts, res)[0]]
    values.append(Cider().compute_score(gts, res)[0])
    found = {name: 100 * float(value) for name, value in zip(MEASURES, values, strict=True)}
    if spice:
        from pycocoevalcap.spice.spice import Spice

        found["SPICE"] = 100 * float(Spice().compute_score(gts, res)[0])
    return found


def _end_with(parent: int) -> None:
    """End this group of processes when the parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    _end_group(os.getpgrp())


def child(job: Path, result: Path, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    texts = json.loads(job.read_text(encoding="utf-8"))
    res = {number: [text] for number, text in enumerate(texts["res"])}
    found = score(res, dict(enumerate(texts["gts"])), texts["spice"])
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(result)


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
