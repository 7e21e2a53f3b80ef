"""One self-contained HTML file about a run: what was evaluated, how sure it is, which queries fail and why, and curves.

It reads files of the run folder (`ranking_*.npz`, `log.txt`, `steps.jsonl`, `config.yaml`) and the images. The page
needs neither a script nor a network. Sources: percentile bootstrap and McNemar's test in `retrieval/statistics.py`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from checkpoints.weights import weights_sha256
from configs.schema import load_config
from data.images import ImageStore, open_store
from models import load
from reports.cases import (
    MISSES,
    OUTCOME_WORDS,
    WAY_WORDS,
    Group,
    case,
    choose_groups,
    compare,
    false_negatives,
    outcomes,
)
from reports.curves import STYLE, as_inline_svg, draw_curves
from reports.heatmaps import word_tiles
from reports.pages import TEMPLATES, as_data_uri
from retrieval.metrics import KS, chance_metrics
from retrieval.published import published_metrics
from retrieval.rankings import WAYS, Rankings, load_rankings, rankings_file
from retrieval.statistics import DRAWS, mcnemar, paired_difference, recall_intervals
from training.journal import STEPS, read_log
from training.preflight import LOG
from utils import Progress

log = logging.getLogger("blip")

THUMB, HEAT = 144, 84  # pixels: a thumbnail's longer side, a word's map
MOST_BYTES = 15_000_000  # of a page
LENGTHS = ((1, 5), (6, 8), (9, 11), (12, 15), (16, 30), (31, 10**9))  # words of a caption
PLACES = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 10**9))
HIDDEN_KEYS = ("val_", "test_", "train_")  # of a row: numbers that stand in tables of their own


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    split: str = ""  # '' = test, or else val
    cases: int = 6  # queries shown of a kind
    seed: int = 0
    heatmaps: bool = False  # draw where matching looks, for each word of the misses that are shown
    device: str = "cpu"


DEFAULTS = Options()


def write_report(run: Path, out: Path, against: Path | None = None, options: Options = DEFAULTS) -> Path:
    """Write the page of a run folder, or of what is there of it; ValueError when there is nothing."""
    rankings = find_rankings(run, options.split)
    if against is not None and rankings is None:
        raise ValueError(f"{run}: there are no kept rankings to compare: evaluate the run (--evaluate).")
    parts: dict[str, Any] = {"run": run.resolve().name, "curves": curves_of(run), "rows": training_rows(run)}
    if rankings is None and not parts["curves"]:
        raise ValueError(
            f"{run}: nothing to report: it has no ranking_test.npz, {LOG} or {STEPS}. Name a run's folder."
        )
    thumbs = Thumbnails(run_store(run))
    if rankings is not None:
        parts |= describe(rankings, options)
        if options.heatmaps:
            parts["heat"] = draw_heat(run, parts["groups"], rankings, thumbs, options.device)
        if against is not None:
            other = load_rankings(rankings_file(against, rankings.split))
            parts["against"] = describe_difference(rankings, other, against.resolve().name, options)
    page = render(parts, thumbs)
    if len(page.encode()) > MOST_BYTES:
        raise ValueError(f"the page would have {len(page.encode()) / 1e6:.0f} MB: show fewer queries (--cases).")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(out)
    return out


def find_rankings(run: Path, split: str) -> Rankings | None:
    """The kept rankings of a run folder; without any, None unless a split is asked for."""
    for name in [split] if split else ["test", "val"]:
        if split or rankings_file(run, name).exists():
            return load_rankings(rankings_file(run, name))
    return None


def run_store(run: Path) -> ImageStore | None:
    """Where the run's images are; None when that is not known, or they are not there any more."""
    config = run / "config.yaml"
    if not config.exists():
        log.warning("warning: the report has no pictures: %s is not there; --evaluate writes it", config)
        return None
    try:
        return open_store(load_config(config))
    except ValueError as error:
        log.warning("warning: the report has no pictures: %s", error)
        return None


# ---- sections -------------------------------------------------------------------------------------------------------


def describe(rankings: Rankings, options: Options) -> dict[str, Any]:
    """The sections about one evaluation."""
    progress = Progress("report", 4, "sections")
    found: dict[str, Any] = {
        "rankings": rankings,
        "provenance": provenance(rankings.row),
        "recall": recall_rows(rankings),
    }
    progress.add(1)
    found["histogram"] = as_inline_svg(draw_places(rankings), "How many queries have their right answer at which rank")
    found["outcomes"] = [
        (WAY_WORDS[way], [(OUTCOME_WORDS[name], int(mask.sum())) for name, mask in outcomes(rankings, way).items()],
         int(rankings.direction(way).asked.sum()), false_negatives(rankings, way))
        for way in WAYS
    ]  # fmt: skip
    progress.add(1)
    found["lengths"] = by_length(rankings)
    progress.add(1)
    found["groups"] = [(WAY_WORDS[way], choose_groups(rankings, way, options.cases, options.seed)) for way in WAYS]
    progress.add(1)
    return found


def provenance(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of the evaluation without its numbers."""
    numbers = [f"{prefix}{key}" for prefix in HIDDEN_KEYS for key in ("file", "file_sha256", "images", "captions")]
    return [(key, str(value)) for key, value in row.items() if not key.startswith(HIDDEN_KEYS) or key in numbers]


def recall_rows(rankings: Rankings) -> list[tuple[str, list[dict[str, Any]]]]:
    """Title, and the six Recalls and r_mean with their intervals, of each line of the table."""
    keys = [*(f"{way}_r{k}" for way in WAYS for k in KS), "r_mean"]
    rows = []
    for title, order in (("re-ranked (ITM)", "itm"), ("contrast (ITC)", "itc")):
        values, intervals = rankings.recall(order), recall_intervals(rankings, order)
        cells = [{"key": key, "value": values[key], "interval": intervals[key]} for key in keys]
        rows.append((title, cells))
    chance = chance_metrics(rankings.image_ids, rankings.caption_ids)
    rows.append(("chance", [{"key": key, "value": chance[key], "interval": None} for key in keys]))
    row, sizes = rankings.row, (len(rankings.images), len(rankings.captions))
    published = published_metrics(row.get("checkpoint", ""), row.get("dataset", ""), rankings.split, *sizes)
    if published:
        rows.append(("published", [{"key": key, "value": published[key], "interval": None} for key in keys]))
    return rows


def by_length(rankings: Rankings) -> list[tuple[str, int, float, float]]:
    """Words of a caption, how many captions, and IR@1 by contrast and re-ranked in percent."""
    words = np.array([len(caption.split()) for caption in rankings.captions])
    rows = []
    for low, high in LENGTHS:
        mask = rankings.img.asked & (words >= low) & (words <= high)
        if mask.any():
            itc, itm = (100 * float((order.place[mask] == 0).mean()) for order in (rankings.img.itc, rankings.img.itm))
            label = f"{low} to {high}" if high < 10**9 else f"more than {low - 1}"
            rows.append((label, int(mask.sum()), itc, itm))
    return rows


def draw_places(rankings: Rankings) -> Figure:
    """Histogram of the rank of the right answer, both directions, both orders."""
    labels = [str(a) if a == b else f"> {a - 1}" if b > 10**6 else f"{a}–{b}" for a, b in PLACES] + [
        "not in\nshortlist"
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axis, way in zip(figure.subplots(1, 2), WAYS, strict=True):
            direction = rankings.direction(way)
            for offset, (order, name, colour) in enumerate(
                ((direction.itc, "contrast", "#9aa7b8"), (direction.itm, "re-ranked", "#1f77b4"))
            ):
                place = order.place[direction.asked]
                counts = [int(((place + 1 >= a) & (place + 1 <= b)).sum()) for a, b in PLACES] + [
                    int((place < 0).sum())
                ]
                share = 100 * np.array(counts) / max(1, len(place))
                axis.bar(np.arange(len(labels)) + 0.4 * offset - 0.2, share, 0.4, label=name, color=colour)
            axis.set_xticks(range(len(labels)), labels)
            axis.set_title(WAY_WORDS[way])
            axis.set_xlabel("rank of the first right answer")
            axis.set_ylabel("% of queries")
            axis.legend()
    return figure


def describe_difference(one: Rankings, other: Rankings, name: str, options: Options) -> dict[str, Any]:
    """The section about two runs on one gallery."""
    rows, groups = [], []
    for way in WAYS:
        masks = compare(one, other, way)
        counts = {key: int(mask.sum()) for key, mask in masks.items()}
        rows.append((WAY_WORDS[way], counts, mcnemar(counts["won"], counts["lost"])))
        rng = np.random.default_rng(options.seed)
        chosen = []
        for key, title in (("won", "Won: right at rank 1 here, not there"), ("lost", "Lost: right there, not here"),
                           ("both", "Right in both"), ("neither", "Right in neither")):  # fmt: skip
            queries = rng.permutation(np.flatnonzero(masks[key]))[: options.cases]
            how = f"drawn by chance (seed {options.seed}); answers of this run"
            chosen.append(Group(title, how, counts[key], [case(one, way, int(q)) for q in queries]))
        groups.append((WAY_WORDS[way], chosen))
    difference, (low, high) = paired_difference(one, other)
    shown = low > 0 or high < 0
    words = f"r_mean {'higher' if difference > 0 else 'lower'} by {abs(difference):.2f} points"
    return {
        "name": name, "rows": rows, "groups": groups, "difference": difference, "low": low, "high": high,
        "verdict": f"{words}: a difference is shown" if shown else "no difference shown",
    }  # fmt: skip


def curves_of(run: Path) -> str:
    """The curves as an <svg>, '' without any."""
    if not any((run / name).exists() for name in (STEPS, LOG)):
        return ""
    return as_inline_svg(draw_curves([run]), "Losses, accuracy, temperature, learning rate, speed, Recall by epoch")


def training_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of log.txt with an epoch."""
    return [row for row in read_log(run / LOG) if "epoch" in row]


def draw_heat(
    run: Path, groups: list[tuple[str, list[Group]]], rankings: Rankings, thumbs: "Thumbnails", device: str
) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """For (image, caption) of each shown miss: its words, and a map of each as a data URI.

    ValueError without pictures, and when the folder's weights are not those that were evaluated.
    """
    if thumbs.store is None:
        raise ValueError(f"{run}: heatmaps need the pictures: see the warning above.")
    blip, found = load(run, device), {}
    require_evaluated(weights_sha256(blip.model), run, rankings)
    pairs = {case.pair for _, list_ in groups for group in list_ if group.title in MISSES for case in group.cases}
    progress = Progress("heatmaps", len(pairs), "pictures")
    for image, caption in sorted(pairs):
        picture = thumbs.store.load(rankings.images[image])
        tiles = word_tiles(picture, blip.heatmap(picture, rankings.captions[caption]), HEAT)
        found[image, caption] = [(word, as_data_uri(tile)) for word, tile in tiles]
        progress.add(1)
    return found


def require_evaluated(sha256: str, run: Path, rankings: Rankings) -> None:
    """ValueError when the rankings are of other weights; files of before may not say of which."""
    row = rankings.row
    if row.get("checkpoint_sha256", sha256) != sha256:
        evaluated = row.get("checkpoint") or row.get("checkpoint_kind") or "other weights"
        raise ValueError(
            f"{rankings_file(run, rankings.split)}: what was evaluated is {evaluated}, but heatmaps would be of the "
            f"weights in {run}, which are others or had another image_size: evaluate these again (--evaluate), or "
            "leave out --heatmaps."
        )


# ---- page -----------------------------------------------------------------------------------------------------------


class Thumbnails:
    """Small JPEGs of the images that a page shows, each once."""

    def __init__(self, store: ImageStore | None):
        self.store = store
        self.data: dict[str, str] = {}  # name: data URI
        self.sizes: dict[str, tuple[int, int]] = {}

    def number(self, name: str) -> int:
        """The picture's number on the page, -1 when it cannot be shown."""
        if name not in self.data:
            try:
                if self.store is None:
                    return -1
                image = self.store.load(name)
            except (ValueError, OSError):
                return -1
            image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
            self.data[name] = as_data_uri(image)
            self.sizes[name] = image.size
        return list(self.data).index(name)


def render(parts: dict[str, Any], thumbs: Thumbnails) -> str:
    """The page; the thumbnails come last, when it is known which are shown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value: f"{value:.2f}"
    drawings = {key: Markup(parts.get(key, "")) for key in ("curves", "histogram")}
    body = environment.get_template("report.html").render(
        **{"rankings": None, "against": None, "heat": {}, **parts, **drawings}, thumbs=thumbs, ks=KS, draws=DRAWS
    )
    pictures = Markup("").join(
        Markup('<image id="p{}" href="{}" width="{}" height="{}"/>').format(number, data, *thumbs.sizes[name])
        for number, (name, data) in enumerate(thumbs.data.items())
    )
    return body.replace("<!-- pictures -->", str(pictures))
