"""Everything that a CUDA card has to show, in one command of nine minutes at most: `make gpu-report`.

    python -m benchmarks.gpu_report                        # writes benchmarks/results/gpu_<card>.json and .md
    python -m benchmarks.gpu_report --minutes 20 --parts training limits
    python -m benchmarks.gpu_report --device cpu --toy --out report   # seconds, to see that it still runs

Each part (`gpu_parts.py`) runs in a process of its own. After each measured row both files are written anew, so that
what was measured is there when time runs out, when a part fails, or when the command is stopped.
"""

import argparse
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from retrieval.provenance import device_memory, device_name
from utils import code_version, init_distributed

RESULTS = Path(__file__).parent / "results"
NAMES = ("checks", "training", "limits", "evaluation", "compiled")  # what may be missing comes last
ROW = "row: "  # what a part's line with a row starts with
Row = dict[str, Any]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure this repository on a CUDA card.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)  # this process is that part
    return parser.parse_args(argv)


# ---- the process of one part ----------------------------------------------------------------------------------------


def run_part(name: str, args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    from benchmarks.gpu_parts import PARTS, TOY, Sizes  # half a minute of imports on a slow disk

    logging.basicConfig(level=logging.WARNING)
    device = init_distributed(args.device)
    torch.manual_seed(0)
    PARTS[name](TOY if args.toy else Sizes(), device, lambda **row: emit(row))


def print_row(row: Row) -> None:
    print(ROW + json.dumps(row, default=float), flush=True)


# ---- the command ----------------------------------------------------------------------------------------------------


def part_command(name: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--part", name, "--device", args.device]
    return [*command, "--toy"] if args.toy else command


def part_lines(name: str, args: argparse.Namespace, seconds: float) -> Iterator[str]:
    """What the part's process prints; RuntimeError when it fails, TimeoutError when it has not ended in time."""
    process = subprocess.Popen(
        part_command(name, args),
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, seconds), stop)
    timer.start()
    last = ""
    try:
        assert process.stdout
        for line in process.stdout:
            last = line.strip() or last
            yield line.rstrip()
        status = process.wait()  # a driver may take its time; the timer ends it
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if late.is_set():
        raise TimeoutError
    if status:
        raise RuntimeError(last)


def measure(report: Row, args: argparse.Namespace, write: Callable[[], None]) -> bool:
    """Run the parts, and write after each row; whether all of them have come to their end."""
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.parts:
        part: Row = {"status": "running", "seconds": 0.0, "rows": []}
        report["parts"][name] = part
        start = time.monotonic()
        print(f"== {name}, {deadline - start:.0f} s left", flush=True)
        try:
            for line in part_lines(name, args, deadline - start):
                if line.startswith(ROW):
                    part["rows"].append(json.loads(line.removeprefix(ROW)))
                    write()
                print(f"{time.monotonic() - start:6.1f} s  {line.removeprefix(ROW)}", flush=True)
            part["status"] = "done"
        except TimeoutError:
            part["status"] = f"stopped, as the {args.minutes:g} minutes were over"
        except RuntimeError as error:
            part["status"] = f"failed: {str(error)[:100]}"
        except KeyboardInterrupt:
            part["status"] = "stopped by Ctrl-C"
            raise
        finally:
            part["seconds"] = round(time.monotonic() - start, 1)
            write()
        print(f"== {name}: {part['status']}", flush=True)
    return all(part["status"] == "done" for part in report["parts"].values())


def head(args: argparse.Namespace, device: torch.device) -> Row:
    """Command, commit, card and date."""
    command = shlex.join(["python", "-m", "benchmarks.gpu_report", *args.argv])
    return {
        "command": command, "code": code_version(), "card": device_name(device),
        "memory_gb": round(device_memory(device) / 1e9, 1), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "toy": args.toy, "parts": {},
    }  # fmt: skip


def file_stem(card: str) -> str:
    return "gpu_" + re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")


def markdown(report: Row) -> str:
    """The report as a page of `benchmarks/results/`."""
    toy = " at toy sizes, which say nothing about speed" if report["toy"] else ""
    lines = [
        f"# Measured on {report['card']}{toy}", "", "```bash", report["command"], "```", "",
        f"- Code: {report['code']}, {report['date']}",
        f"- Hardware: {report['card']}, {report['memory_gb']} GB; torch {report['torch']}, CUDA {report['cuda']}",
    ]  # fmt: skip
    for name, part in report["parts"].items():
        lines += ["", f"## {name.capitalize()}", "", f"{part['status']}, {part['seconds']:.0f} s".capitalize()]
        for table in tables(part["rows"]):
            lines += ["", *table]
    return "\n".join(lines) + "\n"


def tables(rows: list[Row]) -> Iterator[list[str]]:
    """A table for each run of rows that have the same columns."""
    while rows:
        columns = list(rows[0])
        same = [row for row in rows if list(row) == columns]
        rows = [row for row in rows if list(row) != columns]
        titles = " | ".join(column.replace("_", " ") for column in columns)
        cells = (" | ".join(_cell(row[column]) for column in columns) for row in same)
        yield [f"| {titles} |", "|---" * len(columns) + "|", *(f"| {line} |" for line in cells)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")


def write_files(report: Row, folder: Path) -> None:
    """Each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(report["card"])
    for name, text in ((f"{stem}.json", json.dumps(report, indent=1) + "\n"), (f"{stem}.md", markdown(report))):
        part = folder / (name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every part has come to its end, 1 otherwise, 2 without a card, 130 after Ctrl-C."""
    args = parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.part:
        run_part(args.part, args, print_row)
        return 0
    try:
        device = init_distributed(args.device)
    except ValueError as error:
        print(f"error: {error} With --device cpu --toy it shows whether the command runs.", file=sys.stderr)
        return 2
    report = head(args, device)
    try:
        done = measure(report, args, lambda: write_files(report, args.out))
    except KeyboardInterrupt:
        return 130
    print(f"{args.out / file_stem(report['card'])}.json and .md are written")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
