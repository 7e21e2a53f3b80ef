"""Captions to token ids, without a hub: BLIP's caption cleaning, BERT's WordPiece, BLIP's two extra tokens.

A `CaptionTokenizer` belongs to a checkpoint, whose word embeddings mean its vocabulary and no other. BLIP's is the
default, and the functions `clean_caption` and `tokenize` are its.

Sources: BLIP (Li et al., ICML 2022), `pre_caption` and `init_tokenizer`. `bert-base-uncased-vocab.txt` is the unchanged
vocabulary of Google's BERT (Devlin et al., 2018, https://github.com/google-research/bert), licensed Apache-2.0.
Legend: b captions in the batch, L tokens of its longest caption, [CLS] and [SEP] counted.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

PAD, CLS, SEP = 0, 101, 102  # PAD is 0 in every vocabulary, the others are BLIP's
DEC, ENC = 30522, 30523  # behind the vocabulary: [DEC] is first in the checkpoints' word embeddings, [ENC] second
VOCAB_SIZE = 30524
MAX_WORDS = 30
MAX_TOKENS = 35

VOCAB_FILE = Path(__file__).with_name("bert-base-uncased-vocab.txt")
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in a BERT's vocabulary, the first of them first
VOCABULARY, TOKENIZER, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"  # files of a folder

# What becomes what in a lower-case caption, one after the other. As in BLIP only runs of two or more whitespace
# characters become one space, so that at most one is left at either end: a single tab or newline inside stays.
CLEANING = tuple((re.compile(old), new) for old, new in ((r"[.!\"()*#:;~]", " "), (r"\s{2,}", " "), (r"^ |[ \n]$", "")))


class TokenizedText(NamedTuple):
    """Token ids of a batch of captions, padded with 0 to its longest one; the mask is 1 on tokens and 0 on padding."""

    input_ids: Tensor  # (b, L) int64
    attention_mask: Tensor  # (b, L) int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenizedText":
        """The same batch on `device`."""
        return TokenizedText(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def padded(self, columns: int = MAX_TOKENS) -> "TokenizedText":
        """The same batch padded to so many columns."""
        missing = columns - self.input_ids.shape[1]
        return TokenizedText(*(F.pad(tensor, (0, missing)) for tensor in self))  # ids with PAD, masks with 0

    def pin_memory(self) -> "TokenizedText":
        """The same batch in page-locked memory, so that a copy to the GPU can overlap with computation."""
        return TokenizedText(*(tensor.pin_memory() for tensor in self))


def clean_caption(caption: str, max_words: int = MAX_WORDS, lower_case: bool = True) -> str:
    """The caption in lower case, without BLIP's list of punctuation, cut to `max_words` words."""
    text = caption.lower() if lower_case else caption
    for old, new in CLEANING:
        text = old.sub(new, text)
    return " ".join(text.split(" ")[:max_words])


@dataclass(frozen=True)
class CaptionTokenizer:
    """What turns captions into token ids: a vocabulary, BERT's rules for it, and lengths.

    `strip_accents` None: when in lower case, as BERT does. `split_ideographs`: Chinese characters are words of their
    own; that is how a language without spaces is read, which `max_tokens` cuts and `max_words` does not. [DEC] and
    [ENC] have the two ids behind the vocabulary.
    """

    words: tuple[str, ...] = field(repr=False)  # by id
    name: str = "BLIP's (bert-base-uncased)"
    lower_case: bool = True
    strip_accents: bool | None = None
    split_ideographs: bool = True
    max_words: int = MAX_WORDS
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        ids: dict[str, int] = {}
        twice = [word for index, word in enumerate(self.words) if ids.setdefault(word, index) != index]
        lacking = [word for word in REQUIRED if word not in ids]
        if lacking or twice or ids["[PAD]"] != PAD:
            what = f"lacks {', '.join(lacking)}" if lacking else f"has {twice[0]!r} twice" if twice else ""
            raise ValueError(
                f"the vocabulary of {self.name} is no BERT's: it {what or 'does not start with [PAD]'}. One word piece "
                f"a line, each once, [PAD] in the first line, and {', '.join(REQUIRED[1:])} anywhere."
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings: the vocabulary, [DEC] and [ENC]."""
        return len(self.words) + 2

    @property
    def enc(self) -> int:
        return len(self.words) + 1

    @cached_property
    def cls(self) -> int:
        return self.words.index("[CLS]")

    @cached_property
    def sep(self) -> int:
        return self.words.index("[SEP]")

    @cached_property
    def bert(self) -> BertTokenizer:
        """transformers' tokenizer with this vocabulary, [DEC] and [ENC]."""
        tokenizer = BertTokenizer(
            vocab={word: index for index, word in enumerate(self.words)},
            do_lower_case=self.lower_case,
            strip_accents=self.strip_accents,
            tokenize_chinese_chars=self.split_ideographs,
        )
        # Two calls, in BLIP's order: the order decides the ids.
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        special = tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"])
        assert special == [PAD, self.cls, self.sep, self.enc - 1, self.enc], f"special tokens got the ids {special}"
        assert len(tokenizer) == self.vocab_size
        return tokenizer

    def clean(self, caption: str, max_words: int = 0) -> str:
        """`clean_caption` by this tokenizer's case and number of words."""
        return clean_caption(caption, max_words or self.max_words, self.lower_case)

    def tokenize(self, captions: Sequence[str]) -> TokenizedText:
        """Ids and mask of cleaned captions, (b, L) int64 each: [CLS] pieces [SEP], at most `max_tokens`.

        An empty caption is [CLS] [SEP]; no captions give (0, 0). ValueError for a single string.
        """
        if isinstance(captions, str):
            raise ValueError(
                f"tokenize() takes a list of captions and got the single string {captions!r}: pass [caption]."
            )
        if not captions:
            empty = torch.zeros(0, 0, dtype=torch.int64)
            return TokenizedText(empty, empty.clone())
        # To the longest caption: BLIP pads every batch to 35, which gives the same numbers (masked) and is slower.
        batch = self.bert(
            list(captions), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return TokenizedText(batch["input_ids"], batch["attention_mask"])

    def reads_as(self, other: "CaptionTokenizer") -> bool:
        """Whether every caption has the same tokens, but for lengths."""
        return self._rules() == other._rules()

    def _rules(self) -> tuple:
        return self.words, self.lower_case, self.strip_accents, self.split_ideographs

    def __str__(self) -> str:
        digest = hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:8]
        case = "lower case" if self.lower_case else "cased"
        return f"{self.name}, {len(self.words)} word pieces ({digest}), {case}"

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        values = {key: value for key, value in vars(self).items() if key in _FIELDS}
        return values | {"words": "\n".join(self.words)}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> "CaptionTokenizer":
        return CaptionTokenizer(**{**values, "words": tuple(values["words"].split("\n"))})


_FIELDS = CaptionTokenizer.__dataclass_fields__


def has_tokenizer(folder: Path) -> bool:
    return (folder / VOCABULARY).exists() or (folder / TOKENIZER).exists()


def read_tokenizer(folder: Path, max_words: int = MAX_WORDS, max_tokens: int = MAX_TOKENS) -> CaptionTokenizer:
    """The tokenizer of a Hugging Face folder of a BERT: vocab.txt or tokenizer.json, and tokenizer_config.json.

    ValueError when there is none, or one that is no WordPiece.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    rules = [config.get("do_lower_case", True), config.get("strip_accents"), config.get("tokenize_chinese_chars", True)]
    if (folder / VOCABULARY).exists():
        text = (folder / VOCABULARY).read_text(encoding="utf-8")
        words = text.removesuffix("\n").split("\n")
    elif (folder / TOKENIZER).exists():
        parts = read_json(folder / TOKENIZER)
        kind = parts.get("model", {}).get("type")
        if kind != "WordPiece":
            raise ValueError(f"{folder / TOKENIZER}: is a {kind}; only BERT's WordPiece is known here.")
        vocabulary = parts["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        if list(map(vocabulary.__getitem__, words)) != list(range(len(words))):
            raise ValueError(f"{folder / TOKENIZER}: its ids are not 0, 1, 2 and so on.")
        said = parts.get("normalizer") or {}
        for i, key in enumerate(("lowercase", "strip_accents", "handle_chinese_chars")):
            rules[i] = said.get(key, rules[i])
    else:
        raise ValueError(f"{folder}: has neither {VOCABULARY} nor {TOKENIZER}: name the folder of a BERT's tokenizer.")
    return CaptionTokenizer(tuple(words), str(folder), rules[0], rules[1], rules[2], max_words, max_tokens)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; {} where there is none, ValueError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None


# ---- BLIP's ---------------------------------------------------------------------------------------------------------


@cache
def blip_tokenizer(max_words: int = MAX_WORDS, max_tokens: int = MAX_TOKENS) -> CaptionTokenizer:
    """That of BLIP's checkpoints, built once per process; ValueError if the vocabulary file is damaged."""
    tokenizer = CaptionTokenizer(tuple(read_vocabulary()), max_words=max_words, max_tokens=max_tokens)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.enc, tokenizer.vocab_size) == (CLS, SEP, ENC, VOCAB_SIZE)
    return tokenizer


def read_vocabulary() -> dict[str, int]:
    """BERT's 30,522 word pieces and their ids; ValueError if the file is missing or differs in any byte."""
    remedy = "Restore it with `git checkout -- transform/bert-base-uncased-vocab.txt` (line endings must stay LF)."
    if not VOCAB_FILE.is_file():
        raise ValueError(f"The vocabulary {VOCAB_FILE} is missing. {remedy}")
    content = VOCAB_FILE.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != VOCAB_SHA256:
        # One lost line would shift every later id and score nonsense without any error.
        raise ValueError(
            f"The vocabulary {VOCAB_FILE} is damaged: its sha256 is {digest}, not {VOCAB_SHA256}. {remedy}"
        )
    return {token: index for index, token in enumerate(content.decode("utf-8").removesuffix("\n").split("\n"))}


def tokenize(captions: Sequence[str]) -> TokenizedText:
    """Ids and mask of cleaned captions by BLIP's tokenizer (`CaptionTokenizer.tokenize`)."""
    return blip_tokenizer().tokenize(captions)
