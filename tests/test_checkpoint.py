"""Published checkpoints: key contract, what is loaded, resampled, seeded and ignored, and what each wrong file says."""

import argparse
import logging
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from checkpoints.__main__ import main
from checkpoints.files import DamagedFile, read_pth
from checkpoints.load import load_pretrained
from checkpoints.weights import resample_pos_embed
from models.blip_retrieval import BLIP_Retrieval
from tests.conftest import tiny_med, tiny_model

ASSETS = Path(__file__).parent / "assets"
QUEUE_KEYS = ["image_queue", "text_queue", "idx_queue", "ptr_queue"]


def small_model(**overrides) -> BLIP_Retrieval:
    return tiny_model(**{"med_config": tiny_med(vocab_size=50, max_position_embeddings=40), **overrides})


def official_state(model: BLIP_Retrieval) -> dict[str, torch.Tensor]:
    """As BLIP saves it, with the two buffers that this program lacks."""
    state = dict(model.state_dict())
    for name in ("text_encoder", "text_encoder_m"):
        state[f"{name}.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def save(path: Path, state: dict[str, torch.Tensor], **extra) -> str:
    torch.save({"model": state, "optimizer": {}, "config": {"vit": "nano", "init_lr": 1e-5}, "epoch": 3, **extra}, path)
    return str(path)


def trained(model: BLIP_Retrieval) -> BLIP_Retrieval:
    """Twins and queues that differ from online weights and from a new model's."""
    with torch.no_grad():
        for _, twin in model.twins():
            for parameter in twin.parameters():
                parameter.add_(0.1)
        model.idx_queue.copy_(torch.arange(model.queue_size))
        model.ptr_queue.fill_(5)
        model.temp.fill_(0.0321)
    return model


@pytest.mark.parametrize("vit", ["base", "large"])
def test_official_key_contract(vit):
    with torch.device("meta"):
        model = BLIP_Retrieval(vit=vit, image_size=384, queue_size=57600)
    mine = {
        f"{key} {'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        for key, value in model.state_dict().items()
    }
    official = set((ASSETS / f"official_keys_{vit}.txt").read_text().splitlines())
    assert {line.split()[0] for line in official ^ mine} == {
        "text_encoder.embeddings.position_ids", "text_encoder_m.embeddings.position_ids"
    }  # fmt: skip


# ---- loading --------------------------------------------------------------------------------------------------------


def test_retrieval_checkpoint_is_loaded_whole_but_for_the_queues(tmp_path, caplog):
    source, model = trained(small_model()), small_model()
    queues = {key: model.state_dict()[key].clone() for key in QUEUE_KEYS}
    with caplog.at_level(logging.INFO):
        report = load_pretrained(model, save(tmp_path / "a.pth", official_state(source)))
    for key, value in model.state_dict().items():
        expected = queues[key] if key in QUEUE_KEYS else source.state_dict()[key]
        assert torch.equal(value, expected), key
    assert len(report.loaded) == len(source.state_dict()) - 4 and report.missing == QUEUE_KEYS
    assert report.resampled == report.seeded == []
    assert set(report.ignored) == {
        "text_encoder.embeddings.position_ids", "text_encoder_m.embeddings.position_ids", *QUEUE_KEYS
    }  # fmt: skip
    assert str(report) in caplog.text and "already fine-tuned" in str(report) and "6 ignored" in str(report)


def test_queue_of_another_size_does_not_matter(tmp_path):
    model = small_model(queue_size=16)
    load_pretrained(model, save(tmp_path / "a.pth", official_state(trained(small_model()))))
    assert model.image_queue.shape == (32, 16) and (model.idx_queue == -100).all() and model.ptr_queue == 0


def test_pretrained_checkpoint_loses_its_decoder_and_is_resampled(tmp_path):
    """As model_base*.pth: lower resolution, text decoder with tied embeddings, `queue_ptr`, no idx_queue."""
    source, model = trained(small_model(image_size=32)), small_model(image_size=64)
    state = official_state(source)
    del state["idx_queue"], state["ptr_queue"]
    state["queue_ptr"] = torch.ones(1, dtype=torch.long)
    words = "embeddings.word_embeddings.weight"
    state[f"text_decoder.bert.{words}"] = state[f"text_encoder.{words}"]
    state["text_decoder.cls.predictions.bias"] = torch.zeros(50)
    report = load_pretrained(model, save(tmp_path / "a.pth", state))
    assert report.resampled == ["visual_encoder.pos_embed", "visual_encoder_m.pos_embed"]
    assert {"text_decoder.cls.predictions.bias", "queue_ptr"} < set(report.ignored) and "pre-trained" in str(report)
    assert model.ptr_queue == 0 and (model.idx_queue == -100).all()
    for name in ("visual_encoder", "visual_encoder_m"):
        mine, theirs = (getattr(m, name).pos_embed for m in (model, source))
        assert torch.equal(mine, resample_pos_embed(theirs, 17))
    assert not torch.equal(model.visual_encoder.pos_embed, model.visual_encoder_m.pos_embed)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (2, 4), (24, 24)])
def test_resampling_is_blips(old, new):
    pos = torch.randn(1, 1 + old * old, 32)
    grid = F.interpolate(
        pos[:, 1:].reshape(-1, old, old, 32).permute(0, 3, 1, 2), (new, new), mode="bicubic", align_corners=False
    )
    naive = torch.cat((pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    mine = resample_pos_embed(pos, 1 + new * new)
    assert torch.equal(mine, naive)
    assert torch.equal(mine, resample_abs_pos_embed(pos, [new, new], antialias=False))


def test_twins_are_seeded_when_the_file_has_none(tmp_path, caplog):
    source, model = trained(small_model()), small_model()
    state = {key: value for key, value in official_state(source).items() if "_m." not in key}
    with caplog.at_level(logging.INFO):
        report = load_pretrained(model, save(tmp_path / "a.pth", state))
    for online, twin in model.twins():
        for a, b in zip(online.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad
    assert len(report.seeded) == sum("_m." in key for key in model.state_dict())
    assert "twins start at the online weights" in caplog.text


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "model.module._orig_mod.net."])
@pytest.mark.parametrize("zipped", [True, False])
def test_bare_prefixed_and_legacy_files(tmp_path, prefix, zipped):
    source, model = trained(small_model()), small_model()
    state = {prefix + key: value for key, value in official_state(source).items()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_pretrained(model, str(tmp_path / "a.pth"))
    assert torch.equal(model.temp, source.temp)


def average(state: dict) -> dict:
    return {key: value + 1 for key, value in state.items()}


WRAPPED = {
    "Lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3,
                                "pytorch-lightning_version": "2.5", "optimizer_states": [], "callbacks": {}},
    "DeepSpeed": lambda state: {"module": state, "dp_world_size": 2, "mp_world_size": 1},
    "an average beside": lambda state: {"model": state, "model_ema": average(state), "epoch": 1},
    "an average alone": lambda state: {"state_dict_ema": {f"module.{key}": value for key, value in state.items()}},
    "an average in a wrapper": lambda state: {"ema": {"module": state, "updates": 7}},
    "compiled inside": lambda state: {"model": {key.replace("blocks.", "blocks._orig_mod."): value
                                                for key, value in state.items()}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_unwrapped(tmp_path, name, caplog):
    source, model = trained(small_model()), small_model()
    torch.save(WRAPPED[name](official_state(source)), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        load_pretrained(model, str(tmp_path / "a.pth"))
    for key, value in model.state_dict().items():
        assert key in QUEUE_KEYS or torch.equal(source.state_dict()[key], value), key
    assert ("those under model_ema are not used" in caplog.text) == (name == "an average beside")


def test_official_names_in_a_safetensors_file(tmp_path):
    source, model = trained(small_model()), small_model()
    save_file({key: value.clone() for key, value in official_state(source).items()}, tmp_path / "a.safetensors")
    load_pretrained(model, str(tmp_path / "a.safetensors"))
    assert torch.equal(model.temp, source.temp)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:5000])
    with pytest.raises(DamagedFile, match="cut.safetensors: not a safetensors file, or cut short"):
        load_pretrained(model, str(tmp_path / "cut.safetensors"))


def test_half_precision_file_is_loaded_in_full_precision(tmp_path):
    source, model = small_model(), small_model()
    load_pretrained(model, save(tmp_path / "a.pth", official_state(source.half())))
    assert model.vision_proj.weight.dtype == torch.float32
    assert torch.equal(model.vision_proj.weight, source.vision_proj.weight.float())


def test_loaded_model_does_not_depend_on_the_file(tmp_path):
    """The file is mapped into memory while it is read: a later change of it must not reach the model."""
    path, model = tmp_path / "a.pth", small_model()
    load_pretrained(model, save(path, official_state(trained(small_model()))))
    before = model.vision_proj.weight.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model.vision_proj.weight, before)


# ---- files that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "words"), [
    ({"vit": "tiny"}, ["ViT-tiny (192 wide, 12 deep)", "asks for ViT-nano", "`vit: tiny`"]),
    ({"patch_size": 8}, ["patch_size is 8", "`patch_size: 8`"]),
    ({"embed_dim": 16}, ["embed_dim is 16", "`embed_dim: 16`"]),
    ({"med_config": tiny_med(vocab_size=50, max_position_embeddings=40, num_hidden_layers=2)},
     ["num_hidden_layers 2 (config: 3)", "med_config"]),
    ({"med_config": tiny_med(vocab_size=60, max_position_embeddings=40)}, ["vocab_size 60 (config: 50)"]),
])  # fmt: skip
def test_other_sizes_are_named_with_the_key_to_set(tmp_path, overrides, words):
    with pytest.raises(ValueError) as error:
        load_pretrained(small_model(), save(tmp_path / "a.pth", official_state(small_model(**overrides))))
    assert all(word in str(error.value) for word in [str(tmp_path / "a.pth"), *words]), error.value


@pytest.mark.parametrize(("drop", "add", "words"), [
    (("itm_head.weight", "temp"), (), "lacks 2 tensors: temp, itm_head.weight"),
    (("visual_encoder_m.pos_embed",), (), "lacks 1 tensors: visual_encoder_m.pos_embed"),
    ((), ("fusion.weight", "text_encoder.cls.bias"), "also has 2 tensors: fusion.weight, text_encoder.cls.bias"),
    ((), tuple(f"x{i}" for i in range(12)), "x9 and 2 more"),
    (("visual_encoder.pos_embed",), (), "no BLIP model for image-text retrieval"),
])  # fmt: skip
def test_missing_and_unexpected_keys_are_errors_that_change_nothing(tmp_path, drop, add, words):
    state = official_state(small_model())
    state = {key: value for key, value in state.items() if key not in drop} | dict.fromkeys(add, torch.zeros(1))
    model = small_model()
    before = model.vision_proj.weight.clone()
    with pytest.raises(ValueError, match=words):
        load_pretrained(model, save(tmp_path / "a.pth", state))
    assert torch.equal(model.vision_proj.weight, before)


def test_shape_that_no_size_explains_is_named(tmp_path):
    state = official_state(small_model()) | {"itm_head.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="in another shape 1 tensors: itm_head.bias"):
        load_pretrained(small_model(), save(tmp_path / "a.pth", state))


def test_positions_of_no_square_grid_are_refused(tmp_path):
    state = official_state(small_model()) | {"visual_encoder.pos_embed": torch.zeros(1, 7, 96)}
    with pytest.raises(ValueError, match="6 patch positions do not form a square grid"):
        load_pretrained(small_model(), save(tmp_path / "a.pth", state))


def test_number_of_text_heads_is_compared_when_the_file_says_it(tmp_path):
    source = small_model()
    path = save(tmp_path / "a.pth", source.state_dict(), text_config=asdict(source.text_encoder.config))
    load_pretrained(small_model(), path)
    with pytest.raises(ValueError, match="has 4 attention heads, the config's 2"):
        load_pretrained(
            small_model(med_config=tiny_med(vocab_size=50, max_position_embeddings=40, num_attention_heads=2)), path
        )


class Touch:
    """A pickle that runs code when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_not_run(tmp_path, zipped):
    data = {"model": {"temp": torch.ones(1)}, "config": Touch(tmp_path / "ran")}
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds (posix|os).mkdir.*refused"):
        load_pretrained(small_model(), str(tmp_path / "a.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("holder", ["model", "state_dict", "module", ""])
def test_the_remedy_for_a_refused_file_fits_it(tmp_path, holder, zipped, monkeypatch):
    """The printed command makes a file that loads."""
    source = trained(small_model())
    data = {"epoch": 1, holder: official_state(source), "args": argparse.Namespace(model="b")} if holder else source
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is refused") as error:
        load_pretrained(small_model(), str(tmp_path / "a.pth"))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"torch\.save\(.*\)", str(error.value))[0], {"torch": torch})
    model = small_model()
    load_pretrained(model, "weights.pth")
    assert torch.equal(model.temp, source.temp)


def damaged_files(folder: Path) -> dict[str, str]:
    """File name -> words of its error."""
    save(folder / "whole.pth", official_state(small_model()))
    whole = (folder / "whole.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "head.pth").write_bytes(whole[:10])
    (folder / "zeros.pth").write_bytes(bytes(1000))
    (folder / "random.pth").write_bytes(bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist()))
    (folder / "empty.pth").write_bytes(b"")
    (folder / "page.pth").write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
    (folder / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save({"model": {"temp": torch.ones(1)}}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "legacy_cut.pth").write_bytes((folder / "legacy.pth").read_bytes()[:-20])
    (folder / "archive.pth").write_bytes(b"PK\x03\x04" + bytes(500))
    return {
        "cut.pth": "cut short", "head.pth": "cut short", "zeros.pth": "not a PyTorch checkpoint",
        "random.pth": "not a PyTorch checkpoint", "empty.pth": "is empty", "page.pth": "a web page",
        "lfs.pth": "git lfs pull", "legacy_cut.pth": "cut short", "archive.pth": "not a PyTorch checkpoint",
    }  # fmt: skip


def test_damaged_files_are_explained(tmp_path):
    for name, words in damaged_files(tmp_path).items():
        with pytest.raises(DamagedFile) as error:
            load_pretrained(small_model(), str(tmp_path / name))
        assert words in str(error.value) and name in str(error.value), (name, error.value)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("data", "words"), [
    ([1, 2], "holds a list"),
    ({"state": 1, "step": 2}, "no weights.*state, step"),
    ({"model": {}}, "no weights"),
    ({"model": {"a": 1}}, "no weights"),
    ({"a": torch.ones(1)}, "no tensor 'visual_encoder.patch_embed.proj.weight'"),
])  # fmt: skip
def test_checkpoints_of_something_else_are_explained(tmp_path, data, words):
    torch.save(data, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words):
        load_pretrained(small_model(), str(tmp_path / "a.pth"))


def test_plain_pickle_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": Touch(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ValueError):
        load_pretrained(small_model(), str(tmp_path / "a.pth"))
    assert not (tmp_path / "ran").exists()


def test_missing_file_names_the_released_ones(tmp_path):
    with pytest.raises(ValueError, match="did you mean model_base_retrieval_coco.pth"):
        load_pretrained(small_model(), str(tmp_path / "model_base_retrieval_cocco.pth"))
    with pytest.raises(ValueError, match="no such file or folder.*model_large.pth"):
        load_pretrained(small_model(), "zzz")


def test_flipped_bit_is_found_by_the_check_sums(tmp_path):
    save(tmp_path / "a.pth", official_state(small_model()))
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    read_pth(tmp_path / "a.pth")  # torch alone does not notice
    with pytest.raises(DamagedFile, match="checksum"):
        read_pth(tmp_path / "a.pth", check_sums=True)


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    """`main` sets up the process's logging, which other tests must not inherit."""
    monkeypatch.setattr("checkpoints.__main__.setup_logging", lambda: None)


def test_inspect_says_what_a_file_holds(tmp_path, capsys):
    assert main(["inspect", save(tmp_path / "a.pth", official_state(trained(small_model())))]) == 0
    printed = capsys.readouterr().out
    for words in (
        "already fine-tuned",
        "ViT-nano (96 wide, 6 deep), patch 16, image size 32",
        "hidden_size 64",
        "embed_dim 32, temp 0.0321",
        "heads unknown",
        "epoch: 3",
        "ignored: 2 tensors",
        "'init_lr': 1e-05",
    ):
        assert words in printed, words


def test_inspect_counts_the_online_parameters(tmp_path, capsys):
    model = small_model()
    main(["inspect", save(tmp_path / "a.pth", official_state(model))])
    online = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"parameters: {online / 1e6:.1f} M without" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "export", "import"])
def test_commands_end_with_one_paragraph_and_status_2(tmp_path, capsys, command):
    (tmp_path / "page.pth").write_text("<html>no</html>")
    where = str(tmp_path / "page.pth")
    arguments = {"inspect": ["inspect", where], "export": ["export", where, str(tmp_path / "out")],
                 "import": ["import", str(tmp_path / "none"), str(tmp_path / "b.pth")]}[command]  # fmt: skip
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "b.pth").exists() and not (tmp_path / "out").exists()
