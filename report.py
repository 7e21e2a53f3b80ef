"""See what a run learnt: a page about it, two runs compared, curves.

python report.py RUN [--against RUN2] [--heatmaps] [-o report.html]    one HTML file (default: RUN/report.html)
python report.py curves RUN... -o curves.svg|png                       losses and Recall of one or several runs
python report.py captions RUN --gallery train|test [--spice]           retrieved texts measured as captions (Java)
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ABSENT = "report.py needs {}, which is not installed: pip install -r requirements-report.txt"


def page(argv: Sequence[str]) -> Path:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run or of an evaluation")
    parser.add_argument("--against", metavar="RUN2", type=Path, help="compare with another run on the same gallery")
    parser.add_argument("-o", "--out", type=Path, help="the page (default: RUN/report.html)")
    parser.add_argument("--split", default="", choices=("val", "test"), help="default: test, or else val")
    parser.add_argument("--cases", type=int, default=6, help="queries shown of each kind (default 6)")
    parser.add_argument("--heatmaps", action="store_true", help="draw where matching looks, for the misses shown")
    parser.add_argument("--device", default="cpu", help="for --heatmaps: cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="decides which queries are drawn by chance")
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error("--cases is at least 1")
    from reports.report import Options, write_report

    if not args.run.is_dir():
        raise ValueError(f"{args.run}: there is no such folder: name the folder of a run.")
    options = Options(args.split, args.cases, args.seed, args.heatmaps, args.device)
    return write_report(args.run, args.out or args.run / "report.html", args.against, options)


def curves(argv: Sequence[str]) -> Path:
    parser = argparse.ArgumentParser(prog="report.py curves", description="Draw the curves of runs over each other.")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a training run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a file that ends in .svg or .png")
    args = parser.parse_args(argv)
    from reports.curves import draw_curves, save_figure

    return save_figure(draw_curves(args.runs), args.out)


def captions(argv: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(prog="report.py captions", description="Measure retrieved texts as captions.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run with kept rankings of the test split")
    parser.add_argument("--gallery", choices=("train", "test"), required=True, help="where the texts come from")
    parser.add_argument("--spice", action="store_true", help="SPICE too; needs two jars, which are never downloaded")
    parser.add_argument("--device", default="cpu", help="for --gallery train: cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    from reports.captions import caption_table

    return "\n".join(caption_table(args.run, args.gallery, args.spice, args.device))


COMMANDS: dict[str, Callable[[Sequence[str]], Path | str]] = {"curves": curves, "captions": captions}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    try:
        print(command(argv[1:]) if command else page(argv))
    except ModuleNotFoundError as error:
        print(f"error: {ABSENT.format(error.name)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
