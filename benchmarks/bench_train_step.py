"""The published training step against this repository's, on the same weights and batch: time, memory, arithmetic.

    python -m benchmarks.bench_train_step --device cpu --threads 2 --image_size 384 --batch 2 --warm_up 1
    python -m benchmarks.bench_train_step --device cuda --precision fp32 tf32 bf16
    python -m benchmarks.bench_train_step --device cuda --precision bf16 --batch 256 --ranks 8 --micro_batch 32
    python -m benchmarks.bench_train_step --count_only --batch 256 --ranks 8 --micro_batch 32   # no GPU needed

A step is gradients, momentum update, queue and AdamW. Published: per-sample multinomial, three matching pairs a sample
in two passes over repeated image tokens, a loop over parameters for the momentum update, captions padded to 35, the
last 4 image blocks recomputed as in its configs, attention by matrices as its code has it; a second row gives it fused
attention. With `--ranks` R it does the share of one GPU, R times less, and its time is multiplied by R: the whole does
not fit one card. In bf16 on a CPU, one more row has attention as published. Draws are random when timed.

The same run compares gradients in eval mode (no dropout) on a smaller batch of all ranks, published float32 against
ours in each precision; both get the same negatives, independent of rounding. Arithmetic (matrix products, FLOP) is
counted without computing, on tensors without memory.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median
from unittest import mock

import torch
from fairscale.nn.checkpoint.checkpoint_activations import disable_checkpointing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import set_up
from benchmarks.published import published_step
from data.retrieval import TrainBatch
from models.blip_retrieval import BLIP_Retrieval
from training.compilation import compile_encoders
from training.dry_run import hardware, synthetic_batch, synthetic_captions
from training.failures import gpu_memory_is_full
from training.memory import TooLarge, auto_keep_graphs, pool_of_texts
from training.step import Negatives, RetrievalStep, train_step
from transform.text import VOCAB_SIZE, TokenizedText
from utils import memory_mb, precision

ALPHA, CKPT_LAYERS = 0.4, 4
PRECISIONS = ("fp32", "tf32", "bf16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and compare the published training step and this repository's.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS)
    parser.add_argument("--vit", default="base")
    parser.add_argument("--med_config", default="configs/med_config.json")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--queue_size", type=int, default=57600)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step, over all ranks")
    parser.add_argument("--ranks", type=int, default=1, help="emulated ranks")
    parser.add_argument("--micro_batch", type=int, help="samples at once in ours; default: the batch of a rank")
    parser.add_argument("--keep_graphs", default="auto", help="'auto' or a number")
    parser.add_argument("--checkpointing", action="store_true", help="ours recomputes the last 4 image blocks as well")
    parser.add_argument(
        "--local_negatives", action="store_true", help="negatives from the sample's own rank, as for Flickr30k"
    )
    parser.add_argument("--compile", action="store_true", help="also time ours with compiled encoders")
    parser.add_argument("--compare", type=int, help="samples of the gradient comparison; default: at most two a rank")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--count_only", action="store_true", help="count the arithmetic and time nothing")
    args = parser.parse_args(argv)
    if args.batch % args.ranks or args.batch < 2 * args.ranks:
        parser.error("--batch must be a multiple of --ranks, with at least two samples a rank")
    args.micro_batch = args.micro_batch or args.batch // args.ranks
    args.compare = args.compare or min(args.batch, max(4, 2 * args.ranks))
    if args.compare % args.ranks:
        parser.error("--compare must be a multiple of --ranks")
    return args


def build_model(args: argparse.Namespace) -> BLIP_Retrieval:
    """One model for both; ours switches checkpointing off unless asked not to."""
    return BLIP_Retrieval(
        args.med_config,
        args.image_size,
        args.vit,
        vit_grad_ckpt=True,
        vit_ckpt_layer=CKPT_LAYERS,
        queue_size=args.queue_size,
        negative_all_rank=not args.local_negatives,
    )


# ---- the two steps, up to the gradients -----------------------------------------------------------------------------


def ours(model: BLIP_Retrieval, batch: TrainBatch, args: argparse.Namespace, keep_graphs: int) -> None:
    with nullcontext() if args.checkpointing else disable_checkpointing():
        train_step(model, batch.image, batch.text, batch.idx, ALPHA, args.ranks, args.micro_batch, keep_graphs)


def published(model: BLIP_Retrieval, batch: TrainBatch, ranks: int, draw: Callable | None = None) -> None:
    device = batch.image.device
    text = batch.text.to(device)
    losses = published_step(model, batch.image, text, batch.idx, ALPHA, ranks, *([draw] if draw else []))
    (sum(ita + itm for ita, itm in losses) / ranks).backward()


def first_samples(batch: TrainBatch, count: int, device: torch.device) -> TrainBatch:
    """Images and ids on `device`; the text stays on the host, as from a loader."""
    text = TokenizedText(*(x[:count] for x in batch.text))
    return TrainBatch(batch.image[:count].to(device), text, batch.idx[:count].to(device), batch.names[:count])


# ---- gradients ------------------------------------------------------------------------------------------------------


def same_draw(mask: Tensor) -> Tensor:
    """One allowed candidate for each sample, whatever the values: mask (b, c), true = same image, not allowed."""
    noise = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).to(mask.device)
    return noise.masked_fill(mask, -1).argmax(1)


def injected(feat, candidates, idx, candidate_idx, temp, generator) -> tuple[Tensor, Tensor]:
    """In place of models.itm.sample_negatives."""
    same = idx[:, None] == candidate_idx
    return same_draw(same), ~same.all(1)


def gradients(model: BLIP_Retrieval) -> dict[str, Tensor]:
    """Gradients on the host, without those that are zero but for rounding (softmax ignores a shift of the keys)."""
    noise = ("key.bias", "qkv.bias")
    named = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in named.items() if not name.endswith(noise)}


def compare_gradients(
    model: BLIP_Retrieval, batch: TrainBatch, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """For each precision: relative difference of the whole gradient and of the worst parameter to published float32."""
    model, result = model.eval(), {}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with precision(model, "fp32"):
        published(model, batch, args.ranks, lambda weights: same_draw(weights == 0).tolist())
    expected = gradients(model)
    small = argparse.Namespace(**vars(args) | {"micro_batch": min(args.micro_batch, -(-args.compare // 2))})  # several
    for name in args.precision:
        model.load_state_dict(state)
        model.zero_grad()
        with precision(model, name), mock.patch("models.itm.sample_negatives", injected):
            ours(model, batch, small, 0)
        got = gradients(model)
        assert got.keys() == expected.keys()
        apart = {n: ((got[n] - expected[n]).norm(), expected[n].norm()) for n in expected}
        both = torch.tensor(list(apart.values())).square().sum(0).sqrt()
        result[name] = (both[0] / both[1]).item(), max((a / b.clamp_min(1e-20)).item() for a, b in apart.values())
    model.load_state_dict(state)
    model.zero_grad()
    model.train()
    return result


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def count_flops(args: argparse.Namespace) -> dict[str, float]:
    """FLOP a sample at the full size of the step, counted on shapes alone."""
    lengths = synthetic_captions(args.batch, VOCAB_SIZE).attention_mask.sum(1).tolist()
    next_one = lambda weights: [(i + 1) % weights.shape[1] for i in range(len(weights))]  # noqa: E731
    on_host = mock.patch.object(RetrievalStep, "draw_negatives", draw_on_the_host)
    texts_of = mock.patch("training.step._pool_text", lambda text, *_: (text, lengths))
    no_values = mock.patch("torch.nn.init.trunc_normal_", lambda x, **_: x)  # it reads one
    with FakeTensorMode(), on_host, texts_of, no_values:
        model = build_model(args).train()
        ids = torch.zeros(args.batch, max(lengths), dtype=torch.long)
        image = torch.zeros(args.batch, 3, args.image_size, args.image_size)
        batch = TrainBatch(image, TokenizedText(ids, ids), torch.arange(args.batch), [""] * args.batch)
        share = first_samples(batch, args.batch // args.ranks, image.device)
        counts = {"published": flops(lambda: published(model, share, 1, next_one)) / len(share.idx)}
        for words, keep in (("all graphs kept", args.batch), ("one micro-batch kept", 0)):
            counts[words] = flops(lambda keep=keep: ours(model, batch, args, keep)) / args.batch
    return counts


def draw_on_the_host(step: RetrievalStep, pool: slice, image_feat: Tensor, text_feat: Tensor) -> Negatives:
    """Uniform negatives, where features have no values."""
    rng, count = random.Random(pool.start), pool.stop - pool.start
    drawn = [[-1] * len(step.image) for _ in range(2)]
    for some in drawn:
        some[pool] = [pool.start + (i + rng.randrange(1, count)) % count for i in range(count)]
    return Negatives(*drawn)


def flops(work: Callable[[], None]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def arithmetic_lines(args: argparse.Namespace) -> list[str]:
    counts = count_flops(args)
    theirs = counts.pop("published")
    return [
        f"arithmetic of a sample at {args.image_size} px, batch {args.batch}, {args.ranks} rank(s): published "
        f"{theirs / 1e9:.1f} GFLOP; "
        + ", ".join(f"ours with {words} {n / 1e9:.1f} ({theirs / n:.2f}x less)" for words, n in counts.items())
    ]


# ---- timing ---------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """A row of the table: what runs, on how many samples, and what was measured."""

    words: str
    precision: str
    samples: int
    run: Callable[[], None]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    too_large: bool = False  # for the memory


def all_ways(model: BLIP_Retrieval, batch: TrainBatch, args: argparse.Namespace) -> list[Way]:
    """Both algorithms in every precision, all on the same weights."""
    device = model.temp.device
    share, whole = (first_samples(batch, n, device) for n in (args.batch // args.ranks, args.batch))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loop, fused = (
        torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=f, foreach=False) for f in (False, True)
    )
    ways = []
    for name in args.precision:
        for words, context in (("published", by_matrices), ("published, fused attention", nullcontext)):
            work = partial(with_torchs_attention, partial(published_in, context, model, share))
            ways.append(Way(words, name, len(share.idx), whole_step(model, name, loop, work), loop))
        keep = cache(partial(kept_graphs, model, args, fused))  # decided when it runs first, all else being in memory
        work = partial(ours_keeping, model, whole, args, keep)
        ways.append(Way("**this repository**", name, args.batch, whole_step(model, name, fused, work), fused))
        if name == "bf16" and device.type == "cpu":
            plain = whole_step(model, name, fused, partial(with_torchs_attention, work))
            ways.append(Way("this repository, attention in bfloat16", name, args.batch, plain, fused))
    if args.compile:
        compiled = build_model(args).to(device).train()
        compiled.load_state_dict(model.state_dict(), assign=True)  # the same memory
        compile_encoders(compiled)
        fused = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-5, fused=True)
        for name in args.precision:
            keep = cache(partial(kept_graphs, compiled, args, fused))
            run = whole_step(compiled, name, fused, partial(ours_keeping, compiled, whole, args, keep))
            ways.append(Way("**this repository**, compiled", name, args.batch, run, fused))
    return ways


def with_torchs_attention(work: Callable[[], None]) -> None:
    """As the step would be without `models.attention`."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    texts, images = (mock.patch(f"models.{file}.training_attention", kernel) for file in ("arrangements", "vit"))
    with texts, images:
        work()


def by_matrices():
    return sdpa_kernel(SDPBackend.MATH)


def published_in(context: Callable, model: BLIP_Retrieval, batch: TrainBatch) -> None:
    with context():
        published(model, batch, 1)


def ours_keeping(model: BLIP_Retrieval, batch: TrainBatch, args: argparse.Namespace, keep: Callable[[], int]) -> None:
    ours(model, batch, args, keep())


def kept_graphs(model: BLIP_Retrieval, args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> int:
    if args.keep_graphs != "auto":
        return int(args.keep_graphs)
    pool = pool_of_texts(model, args.batch, args.ranks)
    with nullcontext() if args.checkpointing else disable_checkpointing():
        return auto_keep_graphs(model, args.image_size, args.micro_batch, args.batch, optimizer, pool)


def whole_step(
    model: BLIP_Retrieval, name: str, optimizer: torch.optim.Optimizer, work: Callable[[], None]
) -> Callable[[], None]:
    """Gradients and AdamW; the published code has AdamW's loop over parameters, ours the fused kernel."""

    def run() -> None:
        optimizer.zero_grad()
        with precision(model, name):
            work()
        optimizer.step()

    return run


def measure(ways: list[Way], args: argparse.Namespace, device: torch.device) -> None:
    """On a CPU rounds over all ways, so that a slow spell of the machine meets all of them.

    On a GPU one way after the other: what one leaves in the allocator's cache would be given back within the time of
    the next one, which has blocks of other sizes.
    """
    cuda, turns = device.type == "cuda", range(-args.warm_up, args.steps)
    order = ((turn, way) for way in ways for turn in turns) if cuda else ((turn, way) for turn in turns for way in ways)
    for turn, way in order:
        if way.too_large:
            continue
        if cuda:
            if turn == turns[0]:
                torch.cuda.empty_cache()
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            way.run()
            if cuda:
                torch.cuda.synchronize(device)
        except (RuntimeError, TooLarge) as error:
            if not (isinstance(error, TooLarge) or gpu_memory_is_full(error)):
                raise
            way.too_large = True
        if turn >= 0 and not way.too_large:
            way.seconds.append((time.perf_counter() - start) * args.batch / way.samples)
            others = {id(w.optimizer): w.optimizer for w in ways if w.optimizer is not way.optimizer}
            way.megabytes = memory_mb(device) - sum(map(state_megabytes, others.values()))


def state_megabytes(optimizer: torch.optim.Optimizer) -> float:
    """What an optimizer holds on the GPU: not counted as memory of the ways that do not use it."""
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.is_cuda) / 1e6


# ---- report ---------------------------------------------------------------------------------------------------------


def table(ways: list[Way], apart: dict[str, tuple[float, float]], args: argparse.Namespace) -> list[str]:
    """Seconds of a step, and how many times faster than both published rows of its precision and the very first."""
    cuda = args.device != "cpu"
    titles = ["step", "precision", "s a step", "samples/s", "x published", "x with fused attention"]
    titles += [f"x published {ways[0].precision}"] * (len(args.precision) > 1) + ["peak GB"] * cuda
    titles += ["gradient difference"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    middle = {id(way): median(way.seconds) if way.seconds else float("nan") for way in ways}
    for way in ways:
        seconds = middle[id(way)]
        same = [middle[id(w)] for w in ways if w.precision == way.precision and w.words.startswith("published")]
        ratios = [*same, middle[id(ways[0])]] if len(args.precision) > 1 else same
        cells = [way.words, way.precision, f"{seconds:.3f}" if way.seconds else "out of memory"]
        cells += [f"{args.batch / seconds:.2f}", *(f"{other / seconds:.2f}" for other in ratios)]
        cells += [f"{way.megabytes / 1e3:.1f}"] * cuda
        cells += [f"{apart[way.precision][0]:.1e}" if "repository" in way.words else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    lines = arithmetic_lines(args)
    if args.count_only:
        print("\n".join(lines))
        return
    model = build_model(args).to(device)
    batch = synthetic_batch(args.batch, args.image_size, model.text_encoder.config.vocab_size)
    apart = compare_gradients(model, first_samples(batch, args.compare, device), args)
    ways = all_ways(model.train(), batch, args)
    measure(ways, args, device)
    worst = ", ".join(f"{name} {values[1]:.1e}" for name, values in apart.items())
    lines += [
        f"`python -m benchmarks.bench_train_step {shlex.join(argv or sys.argv[1:])}`",
        f"{hardware(device)}, torch {torch.__version__}; ViT-{args.vit} at {args.image_size} px, {args.batch} samples, "
        f"{args.ranks} rank(s), micro-batches of {args.micro_batch}; median of {args.steps}",
        f"gradient difference to published float32 on {args.compare} samples, relative, worst parameter: {worst}",
    ]
    print("\n".join([*table(ways, apart, args), "", *lines]))


if __name__ == "__main__":
    main()
