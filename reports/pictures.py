"""A few sentences of the test split and the pictures that a run ranks first, in one PNG, drawn with Pillow alone.

python -m reports.pictures output/retrieval_scenes docs/pictures      writes docs/pictures/retrieval_scenes.png

The sentences are drawn by a seed, not chosen. Their pictures are ranked as in evaluation: the `k_test` best cosines,
re-ranked by matching logit + cosine. The same run gives the same bytes.

Shapes: N pictures of the split, k shortlist, E embedding width.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from configs.schema import load_config
from data.annotations import NO_IMAGE, Annotations, load_annotations
from data.images import ImageStore, open_store
from models import load
from models.loading import Blip
from retrieval.features import encode

QUERIES, SHOWN = 3, 5

# In pixels.
SIDE, GAP, MARGIN, FRAME = 160, 18, 24, 4
TEXT_WIDTH = 180  # column of the sentences
HEAD, ROW = 56, 248  # heights: the title, one query
COLUMN = SIDE + GAP
WIDTH = 2 * MARGIN + TEXT_WIDTH + SHOWN * COLUMN
GREEN, GREY, INK, PALE, PAPER = (22, 150, 60), (190, 190, 190), (30, 30, 30), (110, 110, 110), (236, 236, 236)


@dataclass(frozen=True)
class Answer:
    """One sentence and its best pictures, best first."""

    sentence: str
    pictures: list[int]  # indices into the split's images
    right: list[bool]
    match: list[float]  # P(match)
    cosine: list[float]
    place: int  # 1-based, of the first right picture; 0: not in the shortlist


# ---- ranking --------------------------------------------------------------------------------------------------------


def answer(blip: Blip, store: ImageStore, split: Annotations, feat: Tensor, caption: int, k_test: int) -> Answer:
    """Rank the split's pictures, with embeddings `feat` (N, E), for one of its captions."""
    sentence = split.captions[caption]
    cosine, shortlist = (feat @ blip.text_features(sentence)[0]).topk(min(k_test, len(feat)))  # (k,), (k,)
    score = blip.score([store.load(split.images[i]) for i in shortlist.tolist()], sentence)[:, 0]  # (k,)
    order = score.argsort(descending=True, stable=True)
    pictures = shortlist[order].tolist()
    right = (split.image_ids[pictures] == split.caption_ids[caption]).tolist()
    best = pictures[:SHOWN]
    match = blip.match([store.load(split.images[i]) for i in best], sentence)[:, 0]
    place = right.index(True) + 1 if any(right) else 0
    return Answer(sentence, best, right[:SHOWN], match.tolist(), cosine[order][:SHOWN].tolist(), place)


def draw_captions(split: Annotations, count: int, seed: int) -> list[int]:
    """`count` captions of different pictures, by chance."""
    rng = np.random.default_rng(seed)
    pictures = rng.permutation(np.unique(split.caption_image[split.caption_image != NO_IMAGE]))[:count]
    return [int(rng.choice(np.flatnonzero(split.caption_image == picture))) for picture in pictures]


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(title: str, answers: Sequence[Answer], pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The sheet: a row for each answer, its sentence on the left of its pictures."""
    sheet = Image.new("RGB", (WIDTH, HEAD + ROW * len(answers)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 20), title, PALE, font(16))
    for row, (query, images) in enumerate(zip(answers, pictures, strict=True)):
        top = HEAD + row * ROW
        pen.line((MARGIN, top, WIDTH - MARGIN, top), GREY)
        _draw_sentence(pen, query, top + GAP)
        for i, image in enumerate(images):
            corner = MARGIN + TEXT_WIDTH + GAP + i * COLUMN, top + GAP
            sheet.paste(_fit(image), corner)
            _draw_frame(pen, corner, query.right[i])
            words = (f"P(match) {query.match[i]:.2f}", f"cosine {query.cosine[i]:.2f}")
            for line, text in enumerate(words):
                where = corner[0] + SIDE // 2, corner[1] + SIDE + FRAME + 14 + 20 * line
                pen.text(where, text, INK, font(15), anchor="mm")
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_sentence(pen: ImageDraw.ImageDraw, query: Answer, top: int) -> None:
    for size in (18, 15, 12, 10):  # the largest in which it does not reach the line below
        lines, spacing = _wrap(query.sentence, font(size), TEXT_WIDTH), size // 3
        if len(lines) * (size + spacing) <= SIDE:
            break
    pen.multiline_text((MARGIN, top), "\n".join(lines), INK, font(size), spacing=spacing)
    place = f"right picture: place {query.place}" if query.place else "right picture: not in\nthe shortlist"
    pen.multiline_text((MARGIN, top + SIDE + FRAME + 7), place, PALE, font(15))


def _draw_frame(pen: ImageDraw.ImageDraw, corner: tuple[int, int], right: bool) -> None:
    """Around a picture: green with a check mark where it is a right answer, else thin and grey."""
    x, y = corner
    width = FRAME if right else 1
    pen.rectangle(
        (x - width, y - width, x + SIDE + width - 1, y + SIDE + width - 1), None, GREEN if right else GREY, width
    )
    if right:
        x, y = x + SIDE - 28, y
        pen.rectangle((x, y, x + 27, y + 27), GREEN)
        pen.line([(x + 6, y + 14), (x + 12, y + 20), (x + 22, y + 7)], "white", 4, joint="curve")


def _fit(image: Image.Image) -> Image.Image:
    """The whole picture on a grey square, in 6 bits a channel: a smaller file that looks the same."""
    return ImageOps.posterize(ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color=PAPER), 6)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words that are at most `width` pixels wide, where words allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# ---- command line ---------------------------------------------------------------------------------------------------


def picture_run(run: Path, out: Path, seed: int = 0, device: str = "cpu") -> Path:
    """Draw what the best weights of a run folder find in its test split; the file is named after the run."""
    cfg = load_config(run / "config.yaml")
    store, blip = open_store(cfg), load(run, device)
    split = load_annotations(cfg, "test", blip.model.tokenizer)
    feat = encode(blip, store, split.images)
    answers = [answer(blip, store, split, feat, i, cfg.k_test) for i in draw_captions(split, QUERIES, seed)]
    title = (
        f"{cfg.dataset}: {len(answers)} sentences of the test split, drawn by chance, and the best of "
        f"{len(split.images)} pictures for each, re-ranked. Green: right."
    )
    sheet = draw(title, answers, [[store.load(split.images[i]) for i in query.pictures] for query in answers])
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{run.resolve().name}.png"
    sheet.save(path, optimize=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend (one paragraph on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m reports.pictures", description="Draw what a run finds.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, with config.yaml and checkpoint_best.pth")
    parser.add_argument("out", metavar="OUT_FOLDER", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="decides which sentences are drawn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    try:
        print(picture_run(args.run, args.out, args.seed, args.device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
