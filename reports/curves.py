"""Curves of one or several runs over each other, drawn from `steps.jsonl` and `log.txt` of their folders."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.journal import STEPS, read_log
from training.preflight import LOG

# Key of steps.jsonl, title.
PANELS = (
    ("loss_ita", "loss_ita (contrast)"), ("loss_itm", "loss_itm (matching)"), ("itm_acc", "accuracy of matching"),
    ("temp", "temperature"), ("lr", "learning rate"), ("images_per_second", "images/s"),
)  # fmt: skip
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
SMOOTH = 0.8  # share of the past in the thick line; the thin one is the number as written
# The same drawing every time: names inside an SVG from a fixed salt, text as text.
STYLE: Any = {"svg.hashsalt": "blip", "svg.fonttype": "none", "font.family": "sans-serif", "axes.grid": True,
         "grid.color": "#dddddd", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}  # fmt: skip


def draw_curves(runs: Sequence[Path]) -> Figure:
    """One panel a number, one colour a run; ValueError for a folder without either file."""
    read = {run: (read_log(run / STEPS), read_log(run / LOG)) for run in runs}
    for run, (steps, rows) in read.items():
        if not steps and not rows:
            raise ValueError(f"{run}: no curves, as it has neither {STEPS} nor {LOG}: name a training run's folder.")
    names = short_names(runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        axes = figure.subplots(3, 3)
        for number, (steps, rows) in enumerate(read.values()):
            colour = COLOURS[number % len(COLOURS)]
            for axis, (key, title) in zip(axes.flat, PANELS, strict=False):
                _draw_steps(axis, steps, key, colour)
                axis.set_title(title)
            _draw_recall(axes.flat[6], rows, "r_mean", colour)
            _draw_recall(axes.flat[7], rows, "txt_r1", colour)
            _draw_recall(axes.flat[8], rows, "img_r1", colour)
        for axis, title in zip(axes.flat[6:], ("val r_mean", "val TR@1", "val IR@1"), strict=True):
            axis.set_title(f"{title}, %")
            axis.set_xlabel("epochs trained; dashed: contrast alone")
        for axis in axes.flat[:6]:
            axis.set_xlabel("step")
        if len(runs) > 1:
            lines = [axes.flat[0].plot([], [], color=COLOURS[i % len(COLOURS)])[0] for i in range(len(runs))]
            figure.legend(lines, names, loc="outside upper center", ncols=min(4, len(runs)))
    return figure


def _draw_steps(axis: Axes, rows: list[dict[str, Any]], key: str, colour: str) -> None:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    smooth, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        smooth.append(mean / (1 - SMOOTH**count))  # as if the past before the first had been like the rest
    if key.startswith("loss") or key.startswith("itm"):
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        axis.plot(steps, smooth, color=colour, linewidth=1.5)
    else:
        axis.plot(steps, values, color=colour, linewidth=1.2)


def _draw_recall(axis: Axes, rows: list[dict[str, Any]], key: str, colour: str) -> None:
    for prefix, style in (("val_", "-"), ("val_itc_", "--")):
        points = [(row["epoch"] + 1, row[prefix + key]) for row in rows if "epoch" in row and prefix + key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3)


def short_names(runs: Sequence[Path]) -> list[str]:
    """The last part of each path or, where two are equal, the whole path."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write an SVG or a PNG, by the name's ending."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"{path}: draw into a file whose name ends in .svg or .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(figure, kind))
    return path


def as_bytes(figure: Figure, kind: str) -> bytes:
    """The drawing as a file of that kind; equal drawings give equal bytes."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def as_inline_svg(figure: Figure, label: str) -> str:
    """An <svg> element for a page, as wide as there is room, with a name for readers who do not see it."""
    text = as_bytes(figure, "svg").decode()
    text = text[text.index("<svg") :]
    body = text.partition(">")[2]
    width, height = (figure.get_size_inches() * 72).tolist()
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{body}'
