"""Search your own pictures by what they show.

python search.py index CHECKPOINT FOLDER_OR_ZIP INDEX        encode every picture once (INDEX: a new folder)
python search.py query INDEX "a dog in the snow"             the best pictures; --image q.jpg for similar ones
python search.py update INDEX                                after pictures were added, changed, moved or removed
python search.py status INDEX                                what the index holds
python search.py export INDEX out.npy|.parquet|.faiss        vectors for other programs
python search.py calibrate RUN                               when to say that nothing matches
python search.py serve INDEX                                 a page in the browser

`python -m torch.distributed.run --nproc_per_node=2 search.py index ...` shares the work of index and update.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.loading import Blip
    from retrieval.index import IndexFolder
    from retrieval.search import Answer, Hit, Searcher

ABSENT = "this needs {}, which is not installed: pip install -r requirements-search.txt"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="search.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, do: Callable[[argparse.Namespace], Any], *places: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name)
        for place in places:
            sub.add_argument(place.lower(), metavar=place, type=str if place == "CHECKPOINT" else Path)
        sub.set_defaults(do=do)
        sub.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (default: cuda when there is one)")
        return sub

    make = command("index", make_index, "CHECKPOINT", "SOURCE", "INDEX")
    make.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    make.add_argument("--config", default="", metavar="YAML", help="for checkpoints that do not tell their sizes")
    make.add_argument("--keep_tokens", action="store_true", help="keep image tokens: re-ranking reads, not encodes")
    make.add_argument("--store", default="", metavar="milvus:FILE.db|milvus:http://HOST:19530")
    update = command("update", update_command, "INDEX")
    update.add_argument("--verify", action="store_true", help="compare every file's digest; decode broken ones again")
    query = command("query", query_command, "INDEX")
    query.add_argument("text", nargs="?", help="what the picture shows")
    query.add_argument("--image", type=Path, help="find similar pictures, or with --texts the texts that fit")
    query.add_argument("--texts", type=Path, metavar="FILE", help="one text a line, to be ranked for --image")
    query.add_argument("--queries", type=Path, metavar="FILE", help="one query a line")
    query.add_argument("--top", type=int, default=10)
    query.add_argument("--rerank", type=int, default=32, help="candidates that matching puts into order; 0: none")
    query.add_argument("--json", action="store_true", help="one line of JSON for each query")
    query.add_argument("--open", action="store_true", help="write a page of the hits, and show it")
    command("status", status_command, "INDEX")
    command("export", export_command, "INDEX", "OUT")
    command("calibrate", calibrate_command, "RUN")
    serve = command("serve", serve_command, "INDEX")
    serve.add_argument("--host", default="127.0.0.1", help="another one than this machine needs the printed token")
    serve.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if args.command == "query" and sum(x is not None for x in (args.text, args.image, args.queries)) != 1:
        parser.error("give one of a text, --image and --queries")
    if args.command == "query" and args.texts and (args.json or args.open or not args.image):
        parser.error("--texts goes with --image, and without --json and --open")
    if args.command == "query" and (args.top < 1 or args.rerank < 0):
        parser.error("--top is at least 1, --rerank at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing matches a single query, 2 something the user can mend, 75 stopped by a signal."""
    args = parse_args(argv)
    from training.failures import let_another_speak, tell_launcher
    from utils import Stopped, StopSignal, is_main, leave_distributed, setup_logging

    setup_logging()
    try:
        status = args.do(args)
        leave_distributed()
        return status or 0
    except Stopped as stopped:
        print(f"stopped by {stopped}: what is done is kept; give the same command again", file=sys.stderr)
        return StopSignal.EXIT_STOPPED
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"error: {ABSENT.format(error.name)}", file=sys.stderr)
        return 2
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith("pymilvus"):
            raise
        if not is_main():
            let_another_speak()
            return 2
        print(f"error: {error}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        return 2


# ---- making an index ------------------------------------------------------------------------------------------------


def make_index(args: argparse.Namespace) -> None:
    from checkpoints.weights import weights_sha256
    from data.images import ImageStore
    from models import load
    from retrieval.index import DEFAULT_THRESHOLD, HEAD, Head, IndexFolder
    from retrieval.indexing import listing
    from retrieval.stores import milvus_place
    from retrieval.threshold import kept_threshold
    from utils import barrier, init_distributed, is_main

    device = init_distributed(args.device)
    if not (args.source.is_dir() or (args.source.is_file() and args.source.suffix.lower() in (".zip", ".tar"))):
        raise ValueError(f"{args.source}: there is no such folder, and it is no .zip or .tar either.")
    if is_main() and not (args.index / HEAD).exists():
        listing(ImageStore(args.source))  # there are pictures: nothing is made before that is known
    store = f"milvus:{milvus_place(args.store)}" if args.store else ""
    blip = load(args.checkpoint, device, args.precision, args.config)
    checkpoint = str(Path(args.checkpoint).resolve()) if Path(args.checkpoint).exists() else args.checkpoint
    sha256 = weights_sha256(blip.model)
    threshold = kept_threshold(args.checkpoint, sha256)
    if is_main() and not (args.index / HEAD).exists():
        tokens = (blip.model.visual_encoder.pos_embed.shape[1], blip.model.visual_encoder.width)
        IndexFolder.create(args.index, Head(
            checkpoint, sha256, str(args.source.resolve()), blip.model.text_proj.out_features, tokens,
            args.keep_tokens, threshold=DEFAULT_THRESHOLD if threshold is None else threshold, store=store,
            precision=args.precision, config=str(Path(args.config).resolve()) if args.config else "",
        )).close()  # fmt: skip
    barrier()
    index = IndexFolder(args.index)
    if Path(index.head.root) != args.source.resolve():
        raise ValueError(f"{args.index} is the index of {index.head.root}: name another folder for {args.source}.")
    if (args.keep_tokens and not index.head.keep_tokens) or (store and store != index.head.store):
        raise ValueError(f"{args.index} was made without --keep_tokens, or with another --store: make a new index.")
    bring_up_to_date(index, blip, sha256, args.checkpoint)


def update_command(args: argparse.Namespace) -> None:
    index, blip, sha256 = open_index(args)
    bring_up_to_date(index, blip, sha256, index.head.checkpoint, args.verify)


def open_index(args: argparse.Namespace) -> "tuple[IndexFolder, Blip, str]":
    """The index, the model that made it, and the hash of its weights."""
    from checkpoints.weights import weights_sha256
    from models import load
    from retrieval.index import IndexFolder
    from utils import init_distributed

    index = IndexFolder(args.index)
    blip = load(index.head.checkpoint, init_distributed(args.device), index.head.precision, index.head.config)
    return index, blip, weights_sha256(blip.model)


def bring_up_to_date(index: "IndexFolder", blip: "Blip", sha256: str, source: str, verify: bool = False) -> None:
    from retrieval.indexing import only_writer, update_index, weights_match
    from retrieval.stores import synchronise
    from utils import StopSignal, is_main

    weights_match(index, sha256, source)
    with only_writer(index):
        with StopSignal() as stop:
            update_index(index, blip, verify, stop.poll)
        if is_main():
            synchronise(index)
    if is_main():
        print("\n".join(describe(index)))


# ---- asking ---------------------------------------------------------------------------------------------------------


def open_searcher(args: argparse.Namespace) -> "Searcher":
    from retrieval.indexing import weights_match
    from retrieval.search import Searcher
    from retrieval.stores import open_store

    index, blip, sha256 = open_index(args)
    weights_match(index, sha256, index.head.checkpoint)
    return Searcher(index, blip, open_store(index))


def query_command(args: argparse.Namespace) -> int:
    from retrieval.search import Answer, as_json

    searcher = open_searcher(args)
    if args.image is not None and args.texts is not None:
        print("\n".join(rank_texts(searcher, args)))
        return 0
    if args.image is not None:
        hits = searcher.image(args.image, args.top)
        answers = [Answer(f"like {args.image}", hits, [], None, searcher.index.head.threshold)]
    elif args.queries is not None:
        answers = searcher.texts(read_lines(args.queries), args.top, args.rerank)
    else:
        answers = searcher.texts([args.text], args.top, args.rerank)
    for answer in answers:
        print(json.dumps(as_json(answer)) if args.json else "\n".join(as_lines(answer)))
    if args.open:
        from reports.hits import show, write_page

        show(write_page(searcher, answers))
    return 1 if args.text is not None and answers[0].matches is False else 0


def rank_texts(searcher: "Searcher", args: argparse.Namespace) -> list[str]:
    """Lines: the texts of a file that fit a picture best; the nearest by contrast in matching's order come first."""
    texts = read_lines(args.texts)
    blip, picture = searcher.blip, searcher.load(args.image)
    cosine = blip.similarity(picture, texts)[0]
    near = cosine.topk(min(len(texts), max(args.top, args.rerank))).indices.tolist()
    matched = near[: args.rerank]
    match, score = (f(picture, [texts[i] for i in matched])[0] for f in (blip.match, blip.score))
    order = sorted(range(len(matched)), key=lambda j: -float(score[j]))
    rows = [(near[j], f"  P(match) {match[j]:.3f}") for j in order] + [(i, "") for i in near[args.rerank :]]
    return [f"{rank:4}  cosine {cosine[i]:.3f}{shown}  {texts[i]}"
            for rank, (i, shown) in enumerate(rows[: args.top], 1)]  # fmt: skip


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    from data.keys import caption_lines

    try:
        lines = caption_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8: save it as UTF-8") from None
    if not lines:
        raise ValueError(f"{path}: has no lines")
    return lines


def as_lines(answer: "Answer") -> list[str]:
    """An answer to read: the contrast list first, then the re-ranked one."""
    from retrieval.search import printable

    def row(hit: "Hit") -> str:
        match = "" if hit.match is None else f"  P(match) {hit.match:.3f}  by contrast {hit.rank_itc}"
        return f"{hit.rank:4}  cosine {hit.cosine:.3f}{match}  {printable(hit.path)}"

    lines = [printable(answer.query), "  by contrast", *map(row, answer.contrast)]
    if answer.reranked:
        lines += ["  re-ranked by matching", *map(row, answer.reranked)]
    if answer.matches is False:
        lines.append(f"  nothing matches: every P(match) is below {answer.threshold:.3f}")
    return lines


# ---- the rest -------------------------------------------------------------------------------------------------------


def status_command(args: argparse.Namespace) -> None:
    from retrieval.index import IndexFolder, read_journal

    index = IndexFolder(args.index)
    waiting = sum(1 for journal in index.folder.glob("part_*.jsonl") for _ in read_journal(journal))
    print("\n".join(describe(index)))
    if waiting:
        print(
            f"{waiting} pictures of a run that is going on, or was interrupted, are not in it yet: wait for it, or run "
            "update if it was interrupted"
        )


def describe(index: "IndexFolder") -> list[str]:
    """Lines about what an index holds."""
    from retrieval.search import printable

    entries = list(index.entries().values())
    bad = [entry for entry in entries if entry.error]
    parts = {path.stem for path in index.folder.glob("part_*.f32")}
    rows = sum(len(index.vectors(part)) for part in parts)
    used = len({(entry.part, entry.row) for entry in entries if entry.part is not None})
    size = sum(path.stat().st_size for path in index.folder.iterdir() if path.is_file())
    head = index.head
    lines = [
        f"{index.folder}: {len(entries) - len(bad)} pictures of {head.root}, {size / 1e6:.1f} MB",
        f"vectors: {used} in use, {rows - used} of pictures that are gone or changed, in {len(parts)} parts",
        f"checkpoint {head.checkpoint} (weights {head.weights_sha256[:12]}), threshold {head.threshold:.3f}",
    ]
    if bad:
        lines.append(f"{len(bad)} pictures cannot be read, the first: {bad[0].name} ({bad[0].error})")
    return [printable(line) for line in lines]


def export_command(args: argparse.Namespace) -> None:
    from retrieval.index import IndexFolder
    from retrieval.search import printable
    from retrieval.stores import export

    print(printable(str(export(IndexFolder(args.index), args.out))))


def calibrate_command(args: argparse.Namespace) -> None:
    from models import load
    from retrieval.threshold import calibrate, keep_threshold
    from utils import init_distributed

    blip = load(args.run, init_distributed(args.device))
    found = calibrate(blip, args.run)
    print(
        f"{keep_threshold(blip, args.run, found)}: P(match) {found.threshold:.3f}; on {found.captions} validation "
        f"captions something matches for {100 * found.found:.1f} % with their picture, nothing for "
        f"{100 * found.nothing:.1f} % without it"
    )


def serve_command(args: argparse.Namespace) -> None:
    from reports.serve import serve

    serve(open_searcher(args), args.host, args.port)


if __name__ == "__main__":
    sys.exit(main())
