"""Captions: cleaning as in BLIP, ids of BERT's uncased vocabulary and of [DEC] and [ENC], limits, a damaged file."""

import random
import re

import pytest
import torch

from transform import text
from transform.text import MAX_TOKENS, TokenizedText, blip_tokenizer, clean_caption, read_vocabulary, tokenize


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Man, riding a horse.", "a man, riding a horse"),  # the comma is not in BLIP's list
        ('Stop! "Now" (please) *x* #1: a;b~c', "stop now please x 1 a b c"),
        ("end.of.sentence", "end of sentence"),
        ("two-tone? it's 50% & more/less", "two-tone? it's 50% & more/less"),
        ("  spaces   inside  and out  ", "spaces inside and out"),
        ("a cat.\n", "a cat"),  # ' \n' is one run of white space
        ("a cat\n", "a cat"),
        ("\n", ""),
        ("a\tb\nc", "a\tb\nc"),  # lone tabs and newlines stay, as in BLIP
        ("a \t b\n\nc", "a b c"),
        ("\ta cat", "\ta cat"),  # only spaces are stripped on the left
        ("", ""),
        ("...", ""),
        ("ÉCLAIR Straße İ", "éclair straße i̇"),
        ("[ENC] <b>", "[enc] <b>"),
    ],
)
def test_clean_caption_like_blip(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_clean_caption_keeps_thirty_words():
    words = [f"w{i}" for i in range(40)]
    assert clean_caption(" ".join(words)).split(" ") == words[:30]
    assert clean_caption(" ".join(words[:30])).split(" ") == words[:30]
    assert clean_caption("one two three", max_words=2) == "one two"


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("", []),
        ("hello world", [7592, 2088]),
        ("a cat on a mat", [1037, 4937, 2006, 1037, 13523]),
        ("two dogs playing in the snow", [2048, 6077, 2652, 1999, 1996, 4586]),
        ("unaffable", [14477, 20961, 3468]),  # una ##ffa ##ble
        ("café", [7668]),  # accents are dropped
        ("A CAT", [1037, 4937]),
        ("a man, sitting", [1037, 2158, 1010, 3564]),
        ("\U0001f600", [100]),  # unknown
    ],
)
def test_known_ids(caption, ids):
    batch = tokenize([caption])
    assert batch.input_ids.tolist() == [[101, *ids, 102]]
    assert batch.attention_mask.tolist() == [[1] * (len(ids) + 2)]


def test_clean_caption_is_blips_on_random_strings():
    def pre_caption(caption, max_words=30):  # BLIP's own lines
        caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
        caption = re.sub(r"\s{2,}", " ", caption)
        caption = caption.rstrip("\n").strip(" ")
        words = caption.split(" ")
        return " ".join(words[:max_words]) if len(words) > max_words else caption

    rng = random.Random(0)
    for _ in range(5000):
        caption = "".join(rng.choices("aB.! \n\t\r\x85", k=rng.randint(0, 12)))
        assert clean_caption(caption) == pre_caption(caption), repr(caption)


def test_special_ids():
    tokenizer = blip_tokenizer().bert
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]) == [0, 101, 102, 30522, 30523]
    assert (text.PAD, text.CLS, text.SEP, text.DEC, text.ENC) == (0, 101, 102, 30522, 30523)
    assert len(tokenizer) == text.VOCAB_SIZE == 30524
    assert tokenizer.bos_token == "[DEC]"
    assert blip_tokenizer().bert is tokenizer


def test_a_caption_cannot_spell_a_special_token():
    batch = tokenize([clean_caption("a [ENC] [SEP] [MASK] cat")])
    assert not torch.isin(batch.input_ids[0, 1:-1], torch.tensor([0, 101, 102, 103, 30522, 30523])).any()


def test_pads_to_the_longest_caption_only():
    batch = tokenize(["a cat on a mat", "", "hello world"])
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 7)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.attention_mask.sum(1).tolist() == [7, 2, 4]
    assert batch.input_ids[1].tolist() == [101, 102, 0, 0, 0, 0, 0]
    assert torch.equal(batch.input_ids != 0, batch.attention_mask.bool())


def test_truncates_to_35_tokens_and_keeps_the_end_mark():
    batch = tokenize(["unaffable " * 30, "cat"])
    assert batch.input_ids.shape == (2, MAX_TOKENS) == (2, 35)
    assert batch.input_ids[0].tolist() == [101, *[14477, 20961, 3468] * 11, 102]
    assert tokenize(["cat"]).input_ids.tolist() == [[101, 4937, 102]]  # no padding left over from the batch before


def test_no_captions():
    batch = tokenize([])
    assert batch.input_ids.shape == batch.attention_mask.shape == (0, 0)
    assert batch.input_ids.dtype == torch.int64


def test_tuple_of_captions_and_single_string():
    assert torch.equal(tokenize(("a cat", "dog")).input_ids, tokenize(["a cat", "dog"]).input_ids)
    with pytest.raises(ValueError, match=r"pass \[caption\]"):
        tokenize("a cat")


def test_to_keeps_type_and_values():
    batch = tokenize(["a cat"])
    moved = batch.to("meta")
    assert isinstance(moved, TokenizedText)
    assert moved.input_ids.device.type == moved.attention_mask.device.type == "meta"
    assert torch.equal(batch.to("cpu", non_blocking=True).input_ids, batch.input_ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pin_memory():
    pinned = tokenize(["a cat"]).pin_memory()
    assert isinstance(pinned, TokenizedText) and all(tensor.is_pinned() for tensor in pinned)


def test_vocabulary_is_checked(tmp_path, monkeypatch):
    vocabulary = read_vocabulary()
    assert len(vocabulary) == 30522
    assert (vocabulary["[PAD]"], vocabulary["[MASK]"], vocabulary["the"]) == (0, 103, 1996)
    content = text.VOCAB_FILE.read_bytes()
    damaged = tmp_path / "vocab.txt"
    monkeypatch.setattr(text, "VOCAB_FILE", damaged)
    for wrong in (content[:-100], content.replace(b"\n", b"\r\n"), b""):
        damaged.write_bytes(wrong)
        with pytest.raises(ValueError, match="vocab.txt is damaged"):
            read_vocabulary()
    damaged.unlink()
    with pytest.raises(ValueError, match="vocab.txt is missing"):
        read_vocabulary()
