"""Captions to token ids, without a hub: BLIP's caption cleaning, BERT's uncased WordPiece, BLIP's two extra tokens.

Sources: BLIP (Li et al., ICML 2022), `pre_caption` and `init_tokenizer`. `bert-base-uncased-vocab.txt` is the unchanged
vocabulary of Google's BERT (Devlin et al., 2018, https://github.com/google-research/bert), licensed Apache-2.0.
Legend: b captions in the batch, L tokens of its longest caption, [CLS] and [SEP] counted.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

PAD, CLS, SEP = 0, 101, 102
DEC, ENC = 30522, 30523  # [DEC] is first in the checkpoints' word embeddings, [ENC] second
VOCAB_SIZE = 30524
MAX_WORDS = 30
MAX_TOKENS = 35

VOCAB_FILE = Path(__file__).with_name("bert-base-uncased-vocab.txt")
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

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

    def padded(self) -> "TokenizedText":
        """The same batch padded to MAX_TOKENS columns."""
        missing = MAX_TOKENS - self.input_ids.shape[1]
        return TokenizedText(*(F.pad(tensor, (0, missing)) for tensor in self))  # ids with PAD, masks with 0

    def pin_memory(self) -> "TokenizedText":
        """The same batch in page-locked memory, so that a copy to the GPU can overlap with computation."""
        return TokenizedText(*(tensor.pin_memory() for tensor in self))


def clean_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """The caption in lower case, without BLIP's list of punctuation, cut to `max_words` words."""
    text = caption.lower()
    for old, new in CLEANING:
        text = old.sub(new, text)
    return " ".join(text.split(" ")[:max_words])


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


@cache
def build_tokenizer() -> BertTokenizer:
    """The tokenizer of BLIP's checkpoints, built once per process; ValueError if the vocabulary file is damaged."""
    tokenizer = BertTokenizer(vocab=read_vocabulary())
    # Two calls, in BLIP's order: the order decides the ids.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    special = tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"])
    assert special == [PAD, CLS, SEP, DEC, ENC], f"special tokens got the ids {special}"
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


def tokenize(captions: Sequence[str]) -> TokenizedText:
    """Ids and mask of cleaned captions, (b, L) int64 each: [CLS] pieces [SEP], at most 35 tokens.

    An empty caption is [CLS] [SEP]; no captions give (0, 0). ValueError for a single string.
    """
    if isinstance(captions, str):
        raise ValueError(f"tokenize() takes a list of captions and got the single string {captions!r}: pass [caption].")
    if not captions:
        empty = torch.zeros(0, 0, dtype=torch.int64)
        return TokenizedText(empty, empty.clone())
    # To the longest caption: BLIP pads every batch to 35, which gives the same numbers (masked) and is slower.
    batch = build_tokenizer()(
        list(captions), padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return TokenizedText(batch["input_ids"], batch["attention_mask"])
