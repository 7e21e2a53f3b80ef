"""The training step against the published algorithm: losses, every parameter's gradient, queues, in float64."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from fairscale.nn.checkpoint import checkpoint_wrapper

import train_retrieval
from benchmarks.published import published_step
from configs.sizes import VitSize
from tests.conftest import random_captions, tiny_med, tiny_model
from tests.golden import NOISE, argmax_instead_of_sampling, losses_by_rank
from tests.test_train import lines
from training.step import Negatives, RetrievalStep, Term, train_step
from transform.text import tokenize

RANKS, BATCH = 4, 3
IDX = torch.tensor([0, 1, 2, 3, 3, 4, 5, 0, 6, 7, 8, 9])  # shared images within and across ranks
F64 = torch.float64


def inputs():
    g = torch.Generator().manual_seed(3)
    image = torch.randn(RANKS * BATCH, 3, 32, 32, generator=g, dtype=F64)
    return image, tokenize(random_captions(RANKS * BATCH, g)), IDX


def half_filled(model):
    model.enqueue(torch.randn(20, 32).to(F64), torch.randn(20, 32).to(F64), torch.arange(20) % 7)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and not name.endswith(NOISE)
    }


def assert_gradients_equal(got, expected, rtol=1e-12):
    assert got.keys() == expected.keys() and len(got) > 100
    for name in expected:
        deviation = (got[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-300)
        assert deviation < rtol, f"{name}: {deviation:.1e}"


@pytest.mark.parametrize("negative_all_rank", [True, False])
@pytest.mark.parametrize(("micro_batch", "keep_graphs"), [(1, 0), (2, 6), (5, 0), (3, 0), (12, 0), (None, 0)])
def test_equals_the_published_algorithm_on_every_rank(monkeypatch, negative_all_rank, micro_batch, keep_graphs):
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    ours = half_filled(tiny_model(F64, negative_all_rank=negative_all_rank))
    theirs = copy.deepcopy(ours)
    likeliest = lambda weights: weights.argmax(1).tolist()  # noqa: E731
    losses = published_step(theirs, image, text, idx, 0.3, RANKS, likeliest)
    (sum(ita + itm for ita, itm in losses) / RANKS).backward()

    report = train_step(ours, image, text, idx, 0.3, RANKS, micro_batch, keep_graphs)
    expected = torch.tensor([[ita.item(), itm.item()] for ita, itm in losses])
    torch.testing.assert_close(losses_by_rank(report), expected, rtol=1e-6, atol=0)
    assert_gradients_equal(gradients(ours), gradients(theirs))
    assert not report.starved
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("negative_all_rank", [True, False])
def test_parameters_after_several_adamw_steps(monkeypatch, negative_all_rank):
    argmax_instead_of_sampling(monkeypatch)
    ours = half_filled(tiny_model(F64, negative_all_rank=negative_all_rank))
    theirs = copy.deepcopy(ours)
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        image = torch.randn(RANKS * BATCH, 3, 32, 32, generator=g, dtype=F64)
        text = tokenize(random_captions(RANKS * BATCH, g))
        for model in (ours, theirs):
            optimizer = getattr(model, "optimizer", None) or torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05
            )
            model.optimizer = optimizer
            optimizer.zero_grad()
            if model is ours:
                train_step(model, image, text, IDX, 0.4, RANKS, micro_batch=2)
            else:
                losses = published_step(model, image, text, IDX, 0.4, RANKS, lambda w: w.argmax(1).tolist())
                (sum(ita + itm for ita, itm in losses) / RANKS).backward()
            optimizer.step()
    for name, parameter in ours.named_parameters():
        if not name.endswith(NOISE):
            torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=0, atol=1e-8, msg=name)
    torch.testing.assert_close(ours.image_queue, theirs.image_queue, rtol=0, atol=1e-9)


def test_forward_is_one_step_of_one_rank(monkeypatch):
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    ours = half_filled(tiny_model(F64))
    theirs = copy.deepcopy(ours)
    loss_ita, loss_itm = theirs(image, text, alpha=0.2, idx=idx)
    (loss_ita + loss_itm).backward()
    report = train_step(ours, image, text, idx, 0.2, micro_batch=5)
    torch.testing.assert_close(
        losses_by_rank(report)[0], torch.tensor([loss_ita.item(), loss_itm.item()]), rtol=1e-6, atol=0
    )
    assert_gradients_equal(gradients(ours), gradients(theirs))


def test_drop_path_is_replayed_when_an_image_is_encoded_again(monkeypatch):
    """ViT-L's stochastic depth: micro-batches with recomputation equal micro-batches with all graphs kept."""
    argmax_instead_of_sampling(monkeypatch)
    monkeypatch.setitem(__import__("models.vit").vit.VIT_SIZES, "nano", VitSize(96, 6, 3, 0.5))
    image, text, idx = inputs()
    model = half_filled(tiny_model(F64, negative_all_rank=True))
    twin = copy.deepcopy(model)
    for m, keep_graphs in ((model, 0), (twin, 12)):
        torch.manual_seed(5)
        train_step(m, image, text, idx, 0.3, RANKS, micro_batch=3, keep_graphs=keep_graphs)
    assert_gradients_equal(gradients(model), gradients(twin))


def test_dropout_changes_nothing_in_expectation():
    """With dropout the step is random as BLIP's is: same mean loss over many draws, and not the same each time."""
    image, text, idx = inputs()
    model = half_filled(tiny_model(F64, med_config=tiny_med(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)))
    start = copy.deepcopy(model.state_dict())
    ours, theirs = [], []
    for seed in range(12):
        for losses in (ours, theirs):
            model.load_state_dict(start)
            torch.manual_seed(seed)
            if losses is ours:
                model.zero_grad()
                losses.append(losses_by_rank(train_step(model, image, text, idx, 0.3, micro_batch=4))[0])
            else:
                with torch.no_grad():
                    losses.append(torch.stack(published_step(model, image, text, idx, 0.3)[0]).float())
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    assert ours.std(0).min() > 0
    spread = (ours.var(0) + theirs.var(0)).div(12).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread).all()


@pytest.mark.parametrize("negative_all_rank", [True, False])
def test_bfloat16_stays_near_float32(monkeypatch, negative_all_rank):
    """Encoders under autocast; features, contrast, queues and momentum weights stay float32."""
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    model = half_filled(tiny_model(F64, negative_all_rank=negative_all_rank)).float()
    exact, plain, checkpointed = (copy.deepcopy(model) for _ in range(3))
    for block in checkpointed.visual_encoder.blocks:
        checkpoint_wrapper(block)
    plain.autocast_dtype = checkpointed.autocast_dtype = torch.bfloat16
    step = RetrievalStep(copy.deepcopy(plain), image.float(), text, idx, 0.3, RANKS)
    samples, pool = slice(0, 3), step.pools()[0]
    text_feat, (tokens, image_feat) = step.encode_text(pool), step.encode_image(pool)
    negatives = step.draw_negatives(pool, image_feat, text_feat)
    terms = step.image_terms(samples, tokens[samples], image_feat[samples], negatives)
    losses = [terms["loss_ita"], terms["loss_itm"], *step.text_terms(samples, text_feat[samples]).values()]
    features = [step.image_feat_m, step.text_feat_m, *(loss.values for loss in losses)]
    assert {x.dtype for x in features} == {torch.float32}
    reports = [train_step(m, image.float(), text, idx, 0.3, RANKS, 3) for m in (exact, plain, checkpointed)]
    torch.testing.assert_close(losses_by_rank(reports[1]), losses_by_rank(reports[0]), rtol=0.02, atol=0)
    for name, values in reports[1].by_rank.items():
        assert torch.equal(values, reports[2].by_rank[name]), name
    for name, buffer in plain.named_buffers():
        assert buffer.dtype == dict(exact.named_buffers())[name].dtype
    torch.testing.assert_close(plain.state_dict()["vision_proj_m.weight"], exact.state_dict()["vision_proj_m.weight"])
    expected, again = gradients(exact), gradients(checkpointed)
    for name, grad in gradients(plain).items():
        assert grad.dtype == torch.float32 and grad.isfinite().all(), name
        torch.testing.assert_close(again[name], grad, rtol=1e-3, atol=1e-6)
        if grad.numel() > 1000:
            assert torch.cosine_similarity(grad.flatten(), expected[name].flatten(), 0) > 0.99, name


@pytest.mark.parametrize("negative_all_rank", [True, False])
def test_the_host_reads_nothing_but_the_draws(monkeypatch, negative_all_rank):
    """On tensors without values any read fails: what would make the host wait for a GPU."""
    image, text, idx = inputs()
    pools = []

    def draw(step, pool, image_feat, text_feat):
        pools.append(pool)
        drawn = [-1] * len(step.image)
        drawn[pool] = [pool.start + (i + 1) % (pool.stop - pool.start) for i in range(pool.stop - pool.start)]
        return Negatives(drawn, drawn)

    monkeypatch.setattr(RetrievalStep, "draw_negatives", draw)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # neither knows the device
    model = tiny_model(negative_all_rank=negative_all_rank).to("meta").train()
    report = train_step(model, image.float().to("meta"), text, idx.to("meta"), 0.3, RANKS, micro_batch=2)
    assert report.by_rank["loss_itm"].is_meta and model.itm_head.weight.grad.is_meta
    assert len(pools) == (1 if negative_all_rank else RANKS)


def test_negatives_at_random_do_not_look_at_similarity(monkeypatch):
    """Without the noise, the likeliest is the most similar other image; at random all are equal, so the first other."""
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    drawn = []
    for hard in (True, False):
        step = RetrievalStep(half_filled(tiny_model(F64)), image, text, idx, 0.3, hard_negatives=hard)
        feat = torch.nn.functional.normalize(torch.randn(12, 32, dtype=F64, generator=torch.manual_seed(0)), dim=1)
        drawn.append(step.draw_negatives(slice(0, 12), feat, feat.roll(1, 0)))
    others = [[j for j in range(12) if idx[j] != idx[i]] for i in range(12)]
    assert drawn[1].image == drawn[1].text == [some[0] for some in others]
    sim = feat.roll(1, 0) @ feat.T  # texts with images
    assert drawn[0].image == [max(some, key=lambda j, i=i: sim[i, j]) for i, some in enumerate(others)]
    assert drawn[0].text == [max(some, key=lambda j, i=i: sim[j, i]) for i, some in enumerate(others)]


def test_a_pool_of_one_image_is_reported():
    image, text, _ = inputs()
    report = train_step(half_filled(tiny_model(F64)), image, text, torch.zeros(12, dtype=torch.long), 0.3)
    assert report.starved


def test_queue_wraps_around():
    model = tiny_model(queue_size=10)
    for start in (0, 7):
        feat = torch.arange(start, start + 7.0)[:, None].expand(7, 32)
        model.enqueue(feat, -feat, torch.arange(start, start + 7))
    assert model.ptr_queue.item() == 4
    assert model.idx_queue[0].tolist() == [10, 11, 12, 13, 4, 5, 6, 7, 8, 9]
    assert model.image_queue[0].tolist() == [10, 11, 12, 13, 4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(model.text_queue, -model.image_queue)


def test_momentum_update_is_the_formula():
    model = tiny_model(momentum=0.9)
    with torch.no_grad():
        model.vision_proj.weight.add_(1)
    before = model.vision_proj_m.weight.clone()
    model.update_momentum()
    torch.testing.assert_close(model.vision_proj_m.weight, 0.9 * before + 0.1 * model.vision_proj.weight)
    assert not any(p.requires_grad for _, twin in model.twins() for p in twin.parameters())


# ---- changing the method --------------------------------------------------------------------------------------------


def extra_values(image_feat):
    return image_feat.pow(3).sum(1)  # (m,)


class StepWithExtraTerm(RetrievalStep):
    """A new loss term is one line in the step, and none elsewhere."""

    def image_terms(self, samples, image_tokens, image_feat, negatives):
        terms = super().image_terms(samples, image_tokens, image_feat, negatives)
        return terms | {"loss_extra": Term(extra_values(image_feat), terms["loss_ita"].rank, self.batch)}


@pytest.mark.parametrize("negative_all_rank", [True, False])
def test_a_new_term_adds_its_gradient_and_nothing_else(monkeypatch, negative_all_rank):
    argmax_instead_of_sampling(monkeypatch)
    image, text, idx = inputs()
    plain = half_filled(tiny_model(F64, negative_all_rank=negative_all_rank))
    extended, alone = copy.deepcopy(plain), copy.deepcopy(plain)
    without = train_step(plain, image, text, idx, 0.3, RANKS, micro_batch=2)
    monkeypatch.setattr("training.step.RetrievalStep", StepWithExtraTerm)
    report = train_step(extended, image, text, idx, 0.3, RANKS, micro_batch=2)

    values = extra_values(alone.image_feature(alone.encode_image(image)))  # all samples at once
    values.mean().backward()
    expected = gradients(plain)
    for name, grad in gradients(alone).items():
        assert name.startswith(("visual_encoder.", "vision_proj.")) and grad.norm() > 0, name
        expected[name] += grad
    assert_gradients_equal(gradients(extended), expected)

    assert list(report.by_rank) == [*without.by_rank, "loss_extra"]
    for name, by_rank in without.by_rank.items():
        assert torch.equal(report.by_rank[name], by_rank), name
    by_rank = values.detach().view(RANKS, BATCH).mean(1).float()
    torch.testing.assert_close(report.by_rank["loss_extra"], by_rank, rtol=1e-6, atol=1e-7)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(extended.named_buffers())[name], buffer), name


def test_a_new_term_is_logged_and_printed_by_itself(tiny_run, monkeypatch, capsys):
    rows, names = {}, {}
    for output, step in (("plain", RetrievalStep), ("extended", StepWithExtraTerm)):
        monkeypatch.setattr("training.step.RetrievalStep", step)
        argv = ["--config", str(tiny_run / "config.yaml"), "--output_dir", str(tiny_run / output), "--device", "cpu"]
        assert train_retrieval.main([*argv, "--set", "init_lr=0", "min_lr=0", "weight_decay=0"]) == 0
        rows[output] = lines(tiny_run / output / "log.txt")
        printed = [line for line in capsys.readouterr().err.splitlines() if re.search(r"epoch \d+ \[", line)]
        names[output] = [re.findall(r"\b(?:loss_\w+|itm_acc|grad_norm|temp|lr)(?= )", line) for line in printed]
    plain, extended = rows["plain"], rows["extended"]
    assert len(names["plain"]) == len(names["extended"]) > 0
    for before, after in zip(names["plain"], names["extended"], strict=True):
        assert "loss_extra" in after and [name for name in after if name != "loss_extra"] == before
    extra = [row.pop("train_loss_extra") for row in extended if row.get("epoch", -1) >= 0]
    assert len(extra) == 2 and all(-1 < value < 1 and value != 0 for value in extra)
    assert extended == plain  # at a learning rate of 0: what the term does to the weights is another test's


def test_a_stage_cannot_be_called_before_what_it_needs():
    image, text, idx = inputs()
    step = RetrievalStep(half_filled(tiny_model(F64)), image, text, idx, 0.3, RANKS)
    samples = step.pools()[0]
    image_tokens, image_feat = step.encode_image(samples)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'negatives'"):
        step.image_terms(samples, image_tokens, image_feat)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'text_feat'"):
        step.draw_negatives(step.pools()[0], image_feat)
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'image_feat' and 'text_feat'"):
        step.draw_negatives(step.pools()[0])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'text_feat'"):
        step.text_terms(samples)
    first, second = step.pools()[:2]
    drawn = step.draw_negatives(first, image_feat, step.encode_text(first))
    with pytest.raises(AssertionError, match="have not drawn their negatives"):  # another pool's
        step.image_terms(second, *step.encode_image(second), drawn)
