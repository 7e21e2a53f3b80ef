"""The tokenizer belongs to the checkpoint: other languages train, are saved, exported, and checked on load."""

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import BertTokenizer, BlipProcessor

import train_retrieval
from checkpoints.__main__ import main as checkpoints_main
from models import load
from tests.conftest import tiny_med, tiny_model
from transform.text import (
    CaptionTokenizer,
    TokenizedText,
    blip_tokenizer,
    clean_caption,
    read_tokenizer,
    tokenize,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RUSSIAN = ["маленькая", "большая", "красная", "синяя", "собака", "кошка", "бежит", "спит", "на", "траве", "у", "дома",
           "Москва", "##ы", "река"]  # fmt: skip
CHINESE = list("一只小大红蓝狗猫在草地上跑睡觉边")


def vocabulary(folder: Path, words: list[str], **rules) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + words) + "\n", encoding="utf-8")
    if rules:
        (folder / "tokenizer_config.json").write_text(json.dumps(rules))
    return folder


# ---- one tokenizer --------------------------------------------------------------------------------------------------


def test_blips_is_the_default():
    ours = blip_tokenizer()
    assert (ours.cls, ours.sep, ours.enc, ours.vocab_size) == (101, 102, 30523, 30524)
    text = ["a man rides a horse", "", "a"]
    assert all(torch.equal(a, b) for a, b in zip(ours.tokenize(text), tokenize(text), strict=True))
    assert ours.clean("A Dog!  Runs") == clean_caption("A Dog!  Runs") == "a dog runs"
    assert tiny_model().tokenizer is ours


def test_russian_with_case(tmp_path):
    cased = read_tokenizer(vocabulary(tmp_path / "ru", RUSSIAN, do_lower_case=False))
    lower = read_tokenizer(vocabulary(tmp_path / "ru2", [word.lower() for word in RUSSIAN]))
    assert cased.clean("Москва, река!") == "Москва, река" and lower.clean("Москва река!") == "москва река"
    place = {word: i for i, word in enumerate(cased.words)}
    ids = cased.tokenize(["Москва река", "москва рекаы"]).input_ids.tolist()
    assert ids[0][:4] == [2, place["Москва"], place["река"], 3]
    assert ids[1][1] == 1 and ids[1][2:4] == [place["река"], place["##ы"]]  # [UNK]: another case
    assert lower.tokenize(["Москва"]).input_ids.tolist() == [[2, place["Москва"], 3]]
    assert not cased.reads_as(lower) and cased.enc == 5 + len(RUSSIAN) + 1


def test_chinese_has_no_spaces(tmp_path):
    whole = read_tokenizer(vocabulary(tmp_path / "zh", CHINESE), max_words=3, max_tokens=8)
    caption = whole.clean("一只小红狗在草地上跑")
    assert caption == "一只小红狗在草地上跑"  # one word to max_words
    ids, mask = whole.tokenize([caption, "小猫"])
    assert ids.shape == (2, 8) and mask[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [whole.words[i] for i in ids[0, 1:7]] == list("一只小红狗在")
    joined = read_tokenizer(vocabulary(tmp_path / "zh2", CHINESE, tokenize_chinese_chars=False))
    assert joined.tokenize(["小猫"]).input_ids.tolist() == [[2, 1, 3]]  # one unknown word


def test_tokenizer_json_and_plain_values_read_back(tmp_path):
    ours = read_tokenizer(vocabulary(tmp_path / "ru", RUSSIAN, do_lower_case=False))
    ours.bert.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").unlink(missing_ok=True)
    again = read_tokenizer(tmp_path / "saved")
    assert again.reads_as(ours) and again.words == ours.words and again.name != ours.name
    assert CaptionTokenizer.from_plain(ours.to_plain()) == ours
    theirs = BertTokenizer.from_pretrained(tmp_path / "saved")
    text = ["Москва река", "большая собака у дома"]
    assert theirs(text, padding=True)["input_ids"] == ours.tokenize(text).input_ids.tolist()


@pytest.mark.parametrize(("words", "said"), [
    (SPECIAL[1:], r"lacks \[PAD\]"),
    ([*SPECIAL, "a", "b", "a"], "has 'a' twice"),
    (["a", *SPECIAL], r"does not start with \[PAD\]"),
    (["a", "b"], r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
])  # fmt: skip
def test_a_vocabulary_that_is_no_berts(tmp_path, words, said):
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(ValueError, match=said):
        read_tokenizer(tmp_path)


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither vocab.txt nor tokenizer.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="is a BPE; only BERT's WordPiece is known"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_tokenizer(tmp_path)


def test_matching_puts_this_vocabularys_enc_first(tmp_path, monkeypatch):
    own = read_tokenizer(vocabulary(tmp_path / "zh", CHINESE))
    model = tiny_model(tokenizer=own, med_config=tiny_med(vocab_size=own.vocab_size)).eval()
    text, seen = own.tokenize(["小猫在睡觉", "大狗跑"]), []
    monkeypatch.setattr(model.text_encoder.embeddings, "forward", spy(model.text_encoder.embeddings.forward, seen))
    with torch.no_grad():
        model.match(text, model.encode_image(torch.randn(2, 3, 32, 32)))
    assert seen[0][:, 0].tolist() == [own.enc] * 2 and seen[0][:, 1:].tolist() == text.input_ids[:, 1:].tolist()
    assert isinstance(text, TokenizedText)


def spy(forward, seen: list):
    def noted(ids):
        seen.append(ids)
        return forward(ids)

    return noted


# ---- runs -----------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "ru": lambda i: f"{RUSSIAN[i % 2]} {RUSSIAN[2 + i // 2 % 2]} {RUSSIAN[4 + i // 4 % 2]} {RUSSIAN[6 + i % 2]}",
    "zh": lambda i: "一只" + CHINESE[2 + i % 2] + CHINESE[4 + i // 2 % 2] + CHINESE[6 + i // 4 % 2] + "在草地上睡觉",
}


def in_language(run: Path, language: str) -> list[str]:
    """The tiny run with captions and a vocabulary of a language; arguments that train it."""
    number = 0
    for split in ("train", "val", "test"):
        rows = json.loads((run / f"{split}.json").read_text())
        for row in rows:
            row["caption"] = [CAPTIONS[language](number), CAPTIONS[language](number) + " " + CAPTIONS[language](7)]
            number += 1
        (run / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    words = RUSSIAN if language == "ru" else CHINESE
    vocabulary(run / language, words)
    values = YAML().load(run / "config.yaml") | {"tokenizer": str(run / language), "max_epoch": 1, "max_tokens": 30}
    YAML().dump(values, run / "own.yaml")
    return ["--config", str(run / "own.yaml"), "--output_dir", str(run / "out"), "--device", "cpu"]


@pytest.mark.parametrize("language", ["ru", "zh"])
def test_a_run_in_another_language(tiny_run, capsys, caplog, language):
    args = in_language(tiny_run, language)
    assert train_retrieval.main(args) == 0
    assert "English" not in caplog.text and "not in the vocabulary" not in caplog.text
    test = [json.loads(line) for line in (tiny_run / "out" / "log.txt").read_text().splitlines()][-1]
    (tiny_run / language).rename(tiny_run / "gone")  # the checkpoint has it
    assert train_retrieval.main([*args, "--evaluate"]) == 0
    assert json.loads((tiny_run / "out" / "evaluate.txt").read_text())["test_r_mean"] == test["test_r_mean"]
    blip = load(tiny_run / "out")
    own = blip.model.tokenizer
    assert own.max_tokens == 30 and own.words == tuple(SPECIAL + (RUSSIAN if language == "ru" else CHINESE))
    captions = [CAPTIONS[language](i) for i in range(3)]
    assert torch.equal(blip.tokens(captions).input_ids, own.tokenize(captions).input_ids)
    assert (blip.tokens(captions).input_ids == 1).sum() == 0  # nothing is unknown

    best = str(tiny_run / "out" / "checkpoint_best.pth")
    assert checkpoints_main(["export", best, str(tiny_run / "hf")]) == 0
    processor = BlipProcessor.from_pretrained(tiny_run / "hf")
    assert processor.tokenizer(captions, padding=True)["input_ids"] == own.tokenize(captions).input_ids.tolist()
    text = json.loads((tiny_run / "hf" / "config.json").read_text())["text_config"]
    assert (text["bos_token_id"], text["sep_token_id"]) == (own.enc - 1, own.sep)
    assert checkpoints_main(["import", str(tiny_run / "hf"), str(tiny_run / "back.pth")]) == 0
    again = load(tiny_run / "back.pth")
    assert again.model.tokenizer.reads_as(own)
    torch.testing.assert_close(again.text_features(captions), blip.text_features(captions))
    assert checkpoints_main(["inspect", best]) == 0
    assert f"{len(own.words)} word pieces" in capsys.readouterr().out


def test_a_checkpoint_with_another_vocabulary_is_an_error_naming_both(tiny_run, capsys):
    args = in_language(tiny_run, "ru")
    assert train_retrieval.main(args) == 0
    capsys.readouterr()
    vocabulary(tiny_run / "other", RUSSIAN[::-1])
    for more in (["--evaluate"], ["--resume", "auto"]):
        assert train_retrieval.main([*args, *more, "--set", f"tokenizer={tiny_run / 'other'}"]) == 2
        said = capsys.readouterr().err
        assert "was trained with the tokenizer" in said and str(tiny_run / "ru") in said
        assert str(tiny_run / "other") in said and "20 word pieces" in said
    assert train_retrieval.main([*args, "--set", "tokenizer=nowhere"]) == 2


def test_captions_that_the_own_vocabulary_does_not_know_are_warned_of(tiny_run, capsys):
    args = in_language(tiny_run, "ru")
    train_retrieval.main([*args, "--check"])
    assert "are not in the vocabulary of" not in capsys.readouterr().out
    vocabulary(tiny_run / "ru", CHINESE)
    train_retrieval.main([*args, "--check"])
    assert "100 % of the word pieces are not in the vocabulary of" in capsys.readouterr().out
