"""Shards that a command fetches into a small folder: each sample once an epoch, the same bits, never too much there."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import train_retrieval
from configs.schema import RetrievalConfig, load_config
from data import cache as cache_file
from data.annotations import load_annotations
from data.cache import ShardCache, open_cache
from data.checks import check_data
from data.images import open_store
from data.loaders import GlobalBatchSampler, recipe_sampler, train_loader
from data.shards import expand, open_shards
from data.tars import INDEX, ShardError
from data.windows import Follower, Windows, window_warnings, windows_of
from retrieval.provenance import files_sha256
from tests.test_resume import assert_equal_outcomes, outcome, sabotaged, straight
from tests.test_shards import pack, pack_folder, png
from tests.test_train import ROOT, run

CPU = torch.device("cpu")
SHARDS, EACH = 6, 4
# Copies like `cp`, notes what it copied, and fails as often as a file beside it says.
COPY = """
import shutil, sys
from pathlib import Path
source, target, notes = map(Path, sys.argv[1:])
with open(notes, "a") as file:
    file.write(source.name + "\\n")
fail = notes.with_name("fail")
if fail.exists() and fail.read_text():
    fail.write_text(fail.read_text()[1:])
    target.write_bytes(b"half")
    sys.exit("no route to host")
shutil.copyfile(source, target)
"""


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Six shards of four pictures in `far`, and the command that fetches them."""
    monkeypatch.setattr(cache_file, "PAUSE_SECONDS", 0)
    for s in range(SHARDS):
        members = {}
        for i in range(EACH):
            number = EACH * s + i
            members |= {f"{number:03d}.png": png(number), f"{number:03d}.txt": f"word {number}\nof {number}".encode()}
        pack(tmp_path / "far" / f"s-{s}.tar", members)
    (tmp_path / "copy.py").write_text(COPY)
    return tmp_path


def command(folder: Path) -> str:
    return f"{sys.executable} {shlex.quote(str(folder / 'copy.py'))} {{source}} {{target}} {folder / 'notes'}"


def fetched(folder: Path) -> list[str]:
    return (folder / "notes").read_text().split() if (folder / "notes").exists() else []


def size_of(folder: Path) -> int:
    return (folder / "far" / "s-0.tar").stat().st_size


def config(folder: Path, shards: float, **options) -> RetrievalConfig:
    """A cache for so many shards."""
    files = dict.fromkeys(("train_file", "val_file", "test_file"), "s-{0..5}.tar")
    return RetrievalConfig(
        dataset="custom", image_root=str(folder / "far" / "s-{0..5}.tar"), ann_root=str(folder), image_size=16,
        fetch=command(folder), cache_dir=str(folder / "cache"), cache_gb=shards * size_of(folder) / 1e9,
        **{"num_workers": 0, "batch_size_train": 4, "global_batch_size": 8, "ranks_emulated": 2, **files, **options},
    )  # fmt: skip


def on_disk(folder: Path) -> list[Path]:
    return list((folder / "cache").rglob("*.tar"))


def batches(cfg: RetrievalConfig, epoch: int = 1, start: int = 0, processes: int = 1, process: int = 0) -> list:
    table = load_annotations(cfg, "train")
    order = recipe_sampler(cfg, table, 3, processes, process)
    order.set_epoch(epoch, start)
    return list(train_loader(cfg, table, order, CPU))


# ---------------------------------------------------------------- order


def windows(limit: float, seed: int = 0, counts: tuple[int, ...] = (3, 1, 4, 1, 5, 9)) -> Windows:
    """Shards of size 10; the last one has no training samples."""
    shard_of = np.repeat(np.arange(len(counts)), counts)[np.random.default_rng(seed).permutation(sum(counts))]
    return Windows(shard_of, [10] * (len(counts) + 1), int(limit))


@pytest.mark.parametrize("limit", [40, 50, 70, 100])
def test_every_sample_comes_once_and_a_window_fits_three_times(limit):
    plan = windows(limit)
    seen = set()
    for epoch in range(4):
        order, parts, ends = plan.order(5, epoch), plan.of_epoch(5, epoch), plan.ends(5, epoch).tolist()
        assert sorted(order.tolist()) == list(range(23))
        assert sorted(shard for part in parts for shard in part) == list(range(6))
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            assert set(plan.shard_of[order[start:end].numpy()]) == set(part)
            assert plan.whole or 10 * 3 * len(part) + 10 <= limit
        assert torch.equal(order, plan.order(5, epoch))
        seen.add(tuple(order.tolist()))
    assert len(seen) == 4 and not torch.equal(plan.order(5, 0), plan.order(6, 0))
    assert len(parts) == (1 if limit >= 70 else 6)


def test_one_window_has_the_order_of_the_unpacked_folder():
    assert torch.equal(windows(70).order(5, 2), torch.randperm(23, generator=torch.Generator().manual_seed(7)))
    with pytest.raises(ValueError, match="cache_gb .* is too small: it must hold 3 shards .* at least 4e-08"):
        windows(39)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_windows_as_one_process_has_them(processes):
    def steps(ranks: range) -> list:
        part = GlobalBatchSampler(23, 4, 4, ranks, 1)
        part.windows = windows(50)
        part.set_epoch(2, 1)
        return list(part)

    each = 4 // processes
    parts = [steps(range(p * each, (p + 1) * each)) for p in range(processes)]
    together = [[index for _, index in sum(step, [])] for step in zip(*parts, strict=True)]
    order = windows(50).order(1, 2)
    assert together == torch.cat([order, order[:1]])[4:].view(5, 4).tolist()  # the first again, as in one window


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_for_all_gives_the_batches_of_the_shards_themselves(far, workers):
    cfg = config(far, SHARDS, num_workers=workers)
    found = batches(cfg)
    here = {"fetch": "", "cache_gb": 0, "ann_root": str(far / "far")}
    expected = batches(RetrievalConfig(**{**vars(cfg), **here}))
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.image, theirs.image) and mine.names == theirs.names
        assert torch.equal(mine.text.input_ids, theirs.text.input_ids) and torch.equal(mine.idx, theirs.idx)
    assert sorted(fetched(far)) == ["s-0.tar", "s-0.tar.index.npz", *(f"s-{i}.tar" for i in range(1, SHARDS))]


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2)])
def test_small_windows_give_each_sample_once_and_resume_exactly(far, workers, processes):
    cfg = config(far, 3.5, num_workers=workers)
    whole = [batches(cfg, 1, 0, processes, process) for process in range(processes)]
    names = [name for part in whole for batch in part for name in batch.names]
    assert sorted(names) == sorted(f"s-{i // EACH}.tar/{i:03d}.png" for i in range(SHARDS * EACH) for _ in range(2))
    for process in range(processes):
        again = batches(cfg, 1, 2, processes, process)
        assert [batch.names for batch in again] == [batch.names for batch in whole[process]][2:]
        assert all(torch.equal(a.image, b.image) for a, b in zip(again, whole[process][2:], strict=True))


def test_never_more_on_the_disk_than_allowed_and_each_shard_once_an_epoch(far):
    cfg = config(far, 3.5)
    table = load_annotations(cfg, "train")  # indexes all
    assert len(on_disk(far)) <= 3
    order = recipe_sampler(cfg, table, 3)
    loader = train_loader(cfg, table, order, CPU)
    (far / "notes").unlink()
    for epoch in range(3):
        order.set_epoch(epoch)
        for _ in loader:
            assert sum(path.stat().st_size for path in on_disk(far)) <= cfg.cache_gb * 1e9
    open_cache(cfg).wait()
    assert len(fetched(far)) <= 3 * SHARDS + 1  # and the first of a fourth epoch
    assert not list((far / "cache").rglob("*.part"))


def test_the_next_window_is_fetched_before_it_is_asked_for(far):
    cache = ShardCache([str(far / "far" / f"s-{i}.tar") for i in range(SHARDS)], command(far), far / "cache", 10**9)
    follower = Follower(cache, Windows(np.repeat(np.arange(SHARDS), EACH), [10] * SHARDS, 30), seed=1)
    first, second, third, *_ = follower.windows.of_epoch(1, 0)
    follower(0, 0, 2)
    cache.wait()
    assert fetched(far) == [f"s-{s}.tar" for s in first + second]
    follower(0, 2, 4)  # the same window
    follower(0, 3, 6)  # one step in two windows
    cache.wait()
    assert fetched(far) == [f"s-{s}.tar" for s in first + second + third]
    follower(0, 4 * SHARDS - 1, 4 * SHARDS)  # the next epoch's first comes next
    cache.wait()
    there = {int(path.stem[-1]) for path in on_disk(far)}
    after = follower.windows.of_epoch(1, 1)[0]
    assert there == {*first, *second, *follower.windows.of_epoch(1, 0)[-1], *after}


def test_a_shard_that_was_deleted_too_early_is_fetched_again(far):
    cfg = config(far, SHARDS)
    store = open_store(cfg)
    expected = open_shards(far / "far").read("003.png")
    for path in on_disk(far):
        path.unlink()
    assert store.shards.read("s-0.tar/003.png") == expected
    assert [path.name for path in on_disk(far)] == ["s-0.tar"]


def test_an_index_beside_the_source_saves_the_first_pass(far):
    open_shards(far / "far")
    assert (far / "far" / f"s-0.tar{INDEX}").exists()
    cfg = config(far, 3.5)
    table = load_annotations(cfg, "train")
    assert len(table.captions) == 2 * SHARDS * EACH
    assert sorted(fetched(far)) == [f"s-{i}.tar{INDEX}" for i in range(SHARDS)]
    assert len(files_sha256(table.files)) == 64 and not on_disk(far)
    assert check_data(cfg, {"train": table}).errors == [] and len(on_disk(far)) == 1  # looks at one shard only


# ---------------------------------------------------------------- what can go wrong


def test_a_command_that_fails_is_tried_again_and_its_words_are_told(far, caplog):
    cache = ShardCache([str(far / "far" / "s-0.tar")], command(far), far / "cache", 10**9)
    (far / "fail").write_text("xx")
    cache.fetch(0)
    assert cache.paths[0].read_bytes() == (far / "far" / "s-0.tar").read_bytes()
    assert "exit status 1, no route to host; trying again" in caplog.text
    cache.paths[0].unlink()
    (far / "fail").write_text("xxx")
    with pytest.raises(
        ShardError, match=r"s-0.tar cannot be fetched with .*copy.py.*\(exit status 1, no route to host\)"
    ):
        cache.fetch(0)
    assert not on_disk(far) and not list((far / "cache").glob("*.part"))
    for wrong, said in (
        ("none {source} {target}", "'none' cannot be started"),
        ("true {source} {target}", "wrote no file"),
    ):
        with pytest.raises(ShardError, match=said):
            ShardCache(["a/x.tar"], wrong, far / "cache", 10**9).fetch(0)
    with pytest.raises(ShardError, match="need different file names"):
        ShardCache(["a/x.tar", "b/x.tar"], "cp {source} {target}", far / "cache", 10**9)


def test_what_fails_ahead_is_raised_at_the_next_step(far):
    cache = ShardCache([str(far / "far" / f"s-{i}.tar") for i in range(3)], command(far), far / "cache", 10**9)
    cache.enter([0], [1])
    cache.wait()
    (far / "fail").write_text("x" * 9)
    cache.enter([1], [2])
    with pytest.raises(ShardError, match="s-2.tar cannot be fetched"):
        cache.enter([2], [0])


def test_a_source_that_has_changed_is_refused(far):
    cfg = config(far, 3.5)
    store = open_store(cfg)
    gone = next(i for i in range(SHARDS) if not store.shards.indexes[i].path.exists())
    with open(far / "far" / f"s-{gone}.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=rf"s-{gone}.tar has \d+ bytes, and had \d+ when it was indexed"):
        store.shards.read(f"s-{gone}.tar/{EACH * gone:03d}.png")


def test_config_and_cache_must_fit(far):
    for wrong, said in (
        ({"fetch": "cp {source}"}, "lacks {target}: write the command"),
        ({"cache_gb": 0}, "fetch and cache_gb go together"),
        ({"image_root": "s3://bucket/folder"}, "names none: write ADDRESS/name-"),
    ):
        with pytest.raises(ValueError, match=said):
            RetrievalConfig(**{**vars(config(far, 3)), **wrong})
    cfg = config(far, 2.5)
    with pytest.raises(ValueError, match="cache_gb .* is too small"):
        windows_of(cfg, load_annotations(cfg, "train"))


def test_the_examples_of_the_page_are_configs(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    here, far = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "here.yaml").write_text("dataset: custom\n" + here)
    (tmp_path / "far.yaml").write_text("dataset: custom\n" + far)
    assert load_config(tmp_path / "here.yaml").val_file == "val-{00..01}.tar"
    cfg = load_config(tmp_path / "far.yaml")
    assert shlex.split(cfg.fetch) == ["aws", "s3", "cp", "{source}", "{target}"] and cfg.cache_gb == 200
    assert expand(cfg.image_root)[1243:] == [f"s3://bucket/cc12m/val-{i}.tar" for i in range(4)]


def test_a_small_window_is_warned_of(far):
    cfg = config(far, 3.5, global_batch_size=4)
    table = load_annotations(cfg, "train")
    (line,) = window_warnings(cfg, table, 0)
    assert "makes 6 windows of shards an epoch, the smallest with 8 samples: the queue of 57600" in line
    with pytest.raises(ValueError, match="windows of 8 samples, which are not two steps of 8: raise cache_gb"):
        window_warnings(config(far, 3.5), table, 0)
    assert window_warnings(config(far, SHARDS), table, 0) == []
    assert window_warnings(config(far, 3.5, queue_size=8, global_batch_size=2, ranks_emulated=1), table, 0) == []


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_from_a_small_cache_that_is_killed_and_resumed_is_bit_equal(tiny_run):
    """Training shards come and go; validation and test have shards of their own, which stay."""
    config = YAML().load(tiny_run / "config.yaml")
    for split in ("train", "val", "test"):
        for number, row in enumerate(json.loads((tiny_run / f"{split}.json").read_text())):
            place = tiny_run / "pairs" / (f"train-{number // 3}" if split == "train" else f"{split}-0")
            place.mkdir(parents=True, exist_ok=True)
            os.rename(tiny_run / "images" / row["image"], place / row["image"])
            (place / f"{Path(row['image']).stem}.txt").write_text("\n".join(row["caption"]))
    sizes = {p.name: pack_folder(tiny_run / "far" / f"{p.name}.tar", p) for p in (tiny_run / "pairs").iterdir()}
    sizes = {name: path.stat().st_size for name, path in sizes.items()}
    room = sizes["val-0"] + sizes["test-0"] + 3 * max(size for name, size in sizes.items() if "train" in name)
    config |= {
        "image_root": str(tiny_run / "far" / "{train-{0..3},val-0,test-0}.tar"), "train_file": "train-{0..3}.tar",
        "val_file": "val-0.tar", "test_file": "test-0.tar", "fetch": "cp {source} {target}", "num_workers": 1,
        "cache_dir": str(tiny_run / "cache"), "cache_gb": room / 1e9,
        "global_batch_size": 3, "ranks_emulated": 1,
    }  # fmt: skip
    YAML().dump(config, tiny_run / "config.yaml")
    assert sabotaged(tiny_run, "SIGKILL", 12).returncode == -9
    assert run(tiny_run, "--resume", "auto", "--set", "save_every_steps=2") == 0
    assert sum(path.stat().st_size for path in on_disk(tiny_run)) <= room < sum(sizes.values())
    expected = straight(tiny_run)
    assert_equal_outcomes(outcome(tiny_run / "out"), expected)
    argv = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / "whole"), "--device", "cpu"]
    assert train_retrieval.main([*argv, "--set", "save_every_steps=2", f"cache_gb={sum(sizes.values()) / 1e9}"]) == 0
    assert outcome(tiny_run / "whole")[0] != expected[0]  # another order: the windows were at work
