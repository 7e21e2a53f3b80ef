"""Two real processes (gloo) against the published two-rank runs and against one process that emulates all ranks."""

import copy
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from retrieval.rerank import own_blocks, rerank
from tests.conftest import random_captions, tiny_model
from tests.golden import (
    GRAD_RTOL,
    LOSS_RTOL,
    NOISE,
    PARAM_ATOL,
    QUEUE_ATOL,
    Golden,
    gradient_deviation,
    losses_by_rank,
    state_deviation,
)
from training.step import train_step
from transform.text import TokenizedText, tokenize
from utils import all_gather, all_reduce_sum, average_gradients

F64 = torch.float64
GOLDENS = ("train_two_ranks_all", "train_two_ranks_local")


def share(batch, rank: int):
    """Rank's half of a global batch."""
    image, captions, idx, alpha = batch
    own = slice(rank * len(idx) // 2, (rank + 1) * len(idx) // 2)
    return image[own], captions[own], idx[own], alpha


def golden_run(name: str, rank: int) -> dict:
    """Three steps of one rank under forward(), as an outside training loop would call it."""
    golden = Golden(name)
    model = golden.model().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05)
    result = {"losses": []}
    for step in range(golden.meta["steps"]):
        image, captions, idx, alpha = share(golden.batch(step), rank)
        optimizer.zero_grad()
        report = train_step(model, image, tokenize(captions), idx, alpha, micro_batch=2)
        with mock.patch("utils.BUCKET_BYTES", 1 << 20):  # several buckets
            average_gradients(model)
        result["losses"].append(all_reduce_sum(losses_by_rank(report)).tolist())
        if step == 0:
            result["gradient"] = gradient_deviation(model, golden)
        optimizer.step()
    result["params"], result["queues"] = state_deviation(model, golden)
    return result


def forward_gradients(name: str, rank: int) -> float:
    """The same gradients through DistributedDataParallel around forward(), BLIP's own interface."""
    golden = Golden(name)
    model = golden.model().train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    image, captions, idx, alpha = share(golden.batch(0), rank)
    loss_ita, loss_itm = wrapped(image, captions, alpha=alpha, idx=idx)
    (loss_ita + loss_itm).backward()
    return gradient_deviation(model, golden)


def emulation_inputs():
    torch.manual_seed(7)
    model = tiny_model(F64, negative_all_rank=True, queue_size=40).train()
    image, text = torch.randn(8, 3, 32, 32, dtype=F64), tokenize(random_captions(8))
    return model, image, text, torch.tensor([0, 1, 1, 2, 3, 4, 5, 0])


def emulate(model, image, text, idx, ranks: int) -> dict:
    report = train_step(model, image, text, idx, 0.3, ranks=ranks, micro_batch=3)
    average_gradients(model)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith(NOISE)}
    return {
        "grads": grads,
        "losses": all_reduce_sum(losses_by_rank(report)),
        "queue": model.image_queue,
        "ids": model.idx_queue,
    }


def ranking_of(model) -> dict:
    torch.manual_seed(11)
    pixels, captions = torch.randn(7, 3, 32, 32), random_captions(15)
    batches = [pixels[list(block)] for block in own_blocks(7, 2)]
    ranking = rerank(model.float().eval(), batches, 7, captions, 4, batch_size=2, tokens_per_pass=50).itm
    return {"i2t": ranking.i2t_value, "t2i": ranking.t2i_value, "lists": ranking.i2t}


def process(rank: int, port: int, folder: str) -> None:
    """One of two gloo processes: everything that needs a partner, its results in a file."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.itm.gumbel", lambda shape, device, generator: torch.zeros(shape, device=device))
        result = {name: golden_run(name, rank) for name in GOLDENS}
        result |= {f"ddp {name}": forward_gradients(name, rank) for name in GOLDENS}
        model, image, text, idx = emulation_inputs()
        own = slice(rank * 4, rank * 4 + 4)
        trimmed = TokenizedText(*(x[own, : text.attention_mask[own].sum(1).max()] for x in text))
        result["emulated"] = emulate(copy.deepcopy(model), image[own], trimmed, idx[own], ranks=2)
    result["gathered"] = all_gather(torch.tensor([[rank, 10 + rank]])).tolist()
    result["ranking"] = ranking_of(model)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDENS)
def test_two_processes_reproduce_the_published_two_ranks(two, name):
    golden = Golden(name)
    for result in (r[name] for r in two):
        for step, losses in enumerate(result["losses"]):
            np.testing.assert_allclose(losses, golden.data[f"loss_{step}"], rtol=LOSS_RTOL)
        assert result["gradient"] < GRAD_RTOL
        assert result["params"] < PARAM_ATOL and result["queues"] < QUEUE_ATOL


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDENS)
def test_forward_under_ddp_reproduces_the_published_gradients(two, name):
    assert max(result[f"ddp {name}"] for result in two) < GRAD_RTOL


@pytest.mark.slow
def test_two_processes_of_two_emulated_ranks_equal_one_of_four(two, monkeypatch):
    monkeypatch.setattr("models.itm.gumbel", lambda shape, device, generator: torch.zeros(shape, device=device))
    expected = emulate(*emulation_inputs(), ranks=4)
    for result in (r["emulated"] for r in two):
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-6, atol=0)
        torch.testing.assert_close(result["queue"], expected["queue"], rtol=0, atol=1e-14)
        assert torch.equal(result["ids"], expected["ids"])
        assert result["grads"].keys() == expected["grads"].keys()
        for name, grad in expected["grads"].items():
            assert (result["grads"][name] - grad).norm() < 1e-12 * grad.norm(), name


@pytest.mark.slow
def test_evaluation_by_two_processes_equals_one_exactly(two):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = ranking_of(emulation_inputs()[0])
    torch.set_num_threads(threads)
    for result in (r["ranking"] for r in two):
        for key, value in expected.items():
            np.testing.assert_array_equal(result[key], value)


@pytest.mark.slow
def test_gathering_keeps_rank_order(two):
    assert all(result["gathered"] == [[0, 10], [1, 11]] for result in two)
