"""The order of samples is DistributedSampler's; pixels depend on (seed, epoch, index) and on nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from configs.schema import RetrievalConfig
from data.annotations import load_annotations
from data.loaders import GlobalBatchSampler, eval_image_loader, train_loader
from data.retrieval import RetrievalTrain, TrainBatch
from transform.text import TokenizedText

CPU = torch.device("cpu")


@pytest.fixture
def cfg(tmp_path):
    """Seven pictures with two captions each, as training, validation and test file."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": "word " * (1 + i + j)} for j in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    files = dict.fromkeys(("train_file", "val_file", "test_file"), "a.json")
    return RetrievalConfig(
        dataset="custom", image_root=str(tmp_path), ann_root=str(tmp_path), image_size=16, num_workers=0,
        batch_size_train=4, batch_size_test=3, **files,
    )  # fmt: skip


def sampler(local_ranks=range(2), seed=3):
    return GlobalBatchSampler(14, 4, 2, local_ranks, seed)


# ---------------------------------------------------------------- sampler


@pytest.mark.parametrize(
    ("samples", "batch", "ranks"), [(14, 4, 2), (103, 8, 4), (100, 30, 3), (64, 64, 8), (5, 8, 8), (7, 7, 1)]
)
def test_steps_are_those_of_distributed_samplers(samples, batch, ranks):
    ours = GlobalBatchSampler(samples, batch, ranks, range(ranks), seed=5)
    b = batch // ranks
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        steps = list(ours)
        assert len(steps) == len(ours)
        for rank in range(ranks):
            theirs = DistributedSampler(range(samples), ranks, rank, shuffle=True, seed=5)
            theirs.set_epoch(epoch)
            order = list(theirs)
            assert len(ours) == len(order) // b
            for step, pairs in enumerate(steps):
                assert pairs[rank * b : (rank + 1) * b] == [
                    (epoch, index) for index in order[step * b : (step + 1) * b]
                ]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_the_ranks_do_what_one_does(processes):
    def steps(local_ranks):
        part = GlobalBatchSampler(103, 16, 8, local_ranks, seed=1)
        part.set_epoch(2)
        return list(part)

    each = 8 // processes
    parts = [steps(range(p * each, (p + 1) * each)) for p in range(processes)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == steps(range(8))


def test_resuming_inside_an_epoch_continues_it():
    whole, rest = sampler(), sampler()
    whole.set_epoch(1)
    rest.set_epoch(1, start_step=2)
    assert list(rest) == list(whole)[2:] and len(rest) == len(whole) == 3


def test_fewer_samples_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="7 training captions do not fill one global batch of 16.*lower"):
        GlobalBatchSampler(7, 16, 2, range(2), seed=0)


# ---------------------------------------------------------------- training


def batches(cfg, epoch=0, start_step=0, **options):
    order = sampler(**options)
    order.set_epoch(epoch, start_step)
    return list(train_loader(cfg, load_annotations(cfg, "train"), order, CPU))


def same(a, b):
    return all(torch.equal(x.image, y.image) and x.names == y.names for x, y in zip(a, b, strict=True))


def test_a_training_batch(cfg):
    table = load_annotations(cfg, "train")
    order = sampler()
    loader = train_loader(cfg, table, order, CPU)
    assert len(loader) == 3
    for batch, pairs in zip(loader, order, strict=True):
        assert isinstance(batch, TrainBatch) and isinstance(batch.text, TokenizedText)
        assert batch.image.shape == (4, 3, 16, 16) and batch.image.dtype == torch.float32
        indices = [index for _, index in pairs]
        assert batch.idx.tolist() == table.caption_ids[indices].tolist() and batch.idx.dtype == torch.int64
        assert batch.names == [table.images[table.caption_image[index]] for index in indices]
        lengths = [len(table.captions[index].split()) + 2 for index in indices]  # with [CLS] and [SEP]
        assert batch.text.attention_mask.sum(1).tolist() == lengths
        assert batch.text.input_ids.shape == (4, max(lengths))


def test_pixels_do_not_depend_on_workers_ranks_or_resuming(cfg):
    torch.manual_seed(0)
    reference = batches(cfg, epoch=1)
    torch.manual_seed(1)
    assert same(batches(replace(cfg, num_workers=1), epoch=1), reference)
    assert same(batches(replace(cfg, num_workers=2), epoch=1), reference)
    assert same(batches(cfg, epoch=1, start_step=1), reference[1:])
    for rank in range(2):
        half = batches(cfg, epoch=1, local_ranks=range(rank, rank + 1))
        for mine, whole in zip(half, reference, strict=True):
            assert torch.equal(mine.image, whole.image[2 * rank : 2 * rank + 2])


def test_pixels_change_with_epoch_and_seed(cfg):
    table = load_annotations(cfg, "train")

    def pixels(seed, epoch, index):
        dataset = train_loader(cfg, table, sampler(seed=seed), CPU).dataset
        assert isinstance(dataset, RetrievalTrain)
        return dataset[epoch, index].image

    first = pixels(0, 0, 4)
    assert torch.equal(pixels(0, 0, 4), first)
    assert not torch.equal(pixels(0, 1, 4), first)
    assert not torch.equal(pixels(1, 0, 4), first)
    assert not torch.equal(pixels(0, 0, 5), first)  # the other caption of the same picture
    plain = train_loader(replace(cfg, augment=False), table, sampler(), CPU).dataset
    assert torch.equal(plain[0, 4].image, plain[1, 5].image)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(cfg, workers):
    """Else dropout, and with it the run, would depend on the number of workers."""
    torch.manual_seed(4)
    before = torch.get_rng_state()
    batches(replace(cfg, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_epochs_of_one_loader_with_lasting_workers(cfg):
    order = sampler()
    loader = train_loader(replace(cfg, num_workers=1), load_annotations(cfg, "train"), order, CPU)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        assert same(list(loader), batches(cfg, epoch=epoch))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_or_is_skipped(cfg, tmp_path, workers, caplog):
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="^image 2.png in .* cannot be read") as error:
        batches(replace(cfg, num_workers=workers))
    assert "\n" not in str(error.value)
    found = batches(replace(cfg, num_workers=workers, on_bad_sample="skip"))
    names = [name for batch in found for name in batch.names]
    assert len(names) == 12 and "2.png" not in names
    if workers == 0:
        assert "skipped: image 2.png" in caplog.text
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the images of custom train can be read"):
        batches(replace(cfg, num_workers=workers, on_bad_sample="skip"))


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_images_come_in_order(cfg, workers):
    table = load_annotations(cfg, "test")
    cfg = replace(cfg, num_workers=workers)
    whole = list(eval_image_loader(cfg, table, range(7), CPU))
    assert [len(batch) for batch in whole] == [3, 3, 1] and whole[0].shape[1:] == (3, 16, 16)
    part = torch.cat(list(eval_image_loader(cfg, table, [5, 1], CPU)))
    assert torch.equal(part, torch.cat(whole)[[5, 1]])
    assert list(eval_image_loader(cfg, table, [], CPU)) == []


def test_broken_evaluation_image_is_named(cfg, tmp_path):
    (tmp_path / "6.png").write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^image 6.png in .* cannot be read"):
            list(eval_image_loader(replace(cfg, num_workers=workers), load_annotations(cfg, "test"), range(7), CPU))
