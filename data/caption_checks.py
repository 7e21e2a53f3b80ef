"""Whether the text encoder can read the captions: what is cut, and what its English vocabulary makes of them."""

from collections.abc import Sequence
from typing import NamedTuple

from data.annotations import Annotations
from data.findings import RARE, Findings, spread
from transform.text import CaptionTokenizer, blip_tokenizer
from utils import Progress

FOREIGN, UNKNOWN, PIECES, ALIKE = 0.05, 0.05, 1.35, 0.01  # above which the captions are not English enough


class Reading(NamedTuple):
    """What tokenisation makes of some captions."""

    long: int  # captions with more than `max_tokens`
    foreign: float  # share of the letters that are not a to z
    unknown: float  # share of the word pieces that the vocabulary does not have
    pieces: float  # word pieces a word
    alike: float  # share of the different captions that have the token ids of another one

    @property
    def unreadable(self) -> bool:
        """Whether so much is lost that another language is likely."""
        limits = (FOREIGN, UNKNOWN, PIECES, ALIKE)
        return any(x > limit for x, limit in zip(self[1:], limits, strict=True))


def check_captions(table: Annotations, limit: int) -> Findings:
    """Captions that are cut (in words, or in tokens), and captions that the vocabulary cannot tell apart."""
    found, tokenizer = Findings(), table.tokenizer
    english = tokenizer.reads_as(blip_tokenizer())
    captions = spread(table.captions, limit)
    reading = read(captions, f"{table.name}: captions", tokenizer)
    sample = "" if len(captions) == len(table.captions) else " looked at"
    words, tokens = tokenizer.max_words, tokenizer.max_tokens
    words, tokens = tokenizer.max_words, tokenizer.max_tokens
    for count, of, what in (
        (table.cut, len(table.captions), f"captions have more than {words} words and are cut there"),
        (
            reading.long,
            len(captions),
            f"captions{sample} have more than {tokens} tokens and are cut there",
        ),
    ):
        if count:
            line = f"{table.name}: {count} of {of} {what}"
            rare = count < RARE * of
            (found.facts if rare else found.warnings).append(line if rare else f"{line}: shorten them")
    if not english and (reading.unknown > UNKNOWN or reading.alike > ALIKE):
        found.warnings.append(
            f"{table.name}: of these captions{sample} {100 * reading.unknown:.0f} % of the word pieces are not in the "
            f"vocabulary of {tokenizer.name}, and {100 * reading.alike:.0f} % of different captions have the same "
            "tokens: is it the vocabulary of their language, and in their case?"
        )
    if english and reading.unreadable:
        found.warnings.append(
            f"{table.name}: the vocabulary is English, but of these captions{sample} {100 * reading.foreign:.0f} % of "
            f"the letters are not a to z, {100 * reading.unknown:.0f} % of the word pieces are unknown, a word is "
            f"{reading.pieces:.1f} pieces (Flickr8k: 1.0), {100 * reading.alike:.0f} % of different captions have the "
            "same tokens: translate what is not English (docs/data.md, Other languages), or start from a text encoder "
            "of that language (text_tower: docs/training.md, Another language)"
        )
    return found


def read(captions: Sequence[str], what: str, captions_to: CaptionTokenizer) -> Reading:
    """Measure what the tokenizer makes of cleaned captions."""
    tokenizer, most = captions_to.bert, captions_to.max_tokens
    long, unknown, total, inner, words = 0, 0, 0, 0, 0
    continues = {number for piece, number in tokenizer.get_vocab().items() if piece.startswith("##")}
    first: dict[tuple[int, ...], str] = {}
    alike, letters, foreign, different = 0, 0, 0, set()
    progress = Progress(what, len(captions), "captions")
    for start in range(0, len(captions), 1000):
        part = captions[start : start + 1000]
        for caption, ids in zip(part, tokenizer(list(part), verbose=False)["input_ids"], strict=True):
            long += len(ids) > most
            unknown += ids.count(tokenizer.unk_token_id)
            total += len(ids) - 2
            inner += sum(map(continues.__contains__, ids))
            words += len(caption.split())
            if caption in different:
                continue
            different.add(caption)
            alike += first.setdefault(tuple(ids[:most]), caption) != caption
            some, others = count_foreign(caption)
            letters, foreign = letters + some, foreign + others
        progress.add(len(part))
    shares = foreign / max(1, letters), unknown / max(1, total)
    return Reading(long, *shares, 1 + inner / max(1, words), alike / max(1, len(different)))


def count_foreign(text: str) -> tuple[int, int]:
    """Letters, and those of them outside a to z: other scripts, and accents, which the tokenizer drops."""
    letters = sum(map(str.isalpha, text))
    return letters, 0 if text.isascii() else sum(letter.isalpha() and not letter.isascii() for letter in text)
