"""Evaluation: contrast picks shortlists both ways, matching re-ranks them; each needed (image, text) pair once.

The protocol is BLIP's (`evaluation` in its train_retrieval.py): score = matching logit + cosine, for the k_test best
cosines of each query. The order of work is not: pairs of both directions are united and grouped by image, so that an
image's keys and values are computed once; texts are packed by exact length, so that nothing is padded; the last layer
computes [ENC] alone; what layer 0 does before it sees the image is done once per text. All of it is exact.

Blocks of `batch_size` images are dealt to the processes and passes never cross a block, so results do not depend on the
number of processes.

Shapes: N images, M texts, k shortlist, n image tokens, V image width, D text width, E embedding width, H heads,
T tokens and P pairs of one pass, m images of one pass.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.blip_retrieval import BLIP_Retrieval, as_match_input
from models.med import PaddedTexts, merge_heads, split_heads
from transform.text import TokenizedText, tokenize
from utils import Progress, all_reduce_sum, get_rank, get_world_size

log = logging.getLogger(__name__)
SIMILARITY_CHUNK = 1 << 24  # cosines held at once while shortlisting


@dataclass(frozen=True)
class Shortlists:
    """Both directions' best candidates and their values: i2t (N, k), t2i (M, k)."""

    i2t: np.ndarray  # text indices
    i2t_value: np.ndarray
    t2i: np.ndarray  # image indices
    t2i_value: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """The same shortlists with cosines (`itc`) and with matching logit + cosine (`itm`), and the pairs it took."""

    itc: Shortlists
    itm: Shortlists
    num_pairs: int


@torch.inference_mode()
def rerank(
    model: BLIP_Retrieval,
    image_batches: Iterable[Tensor],
    num_images: int,
    captions: Sequence[str],
    k_test: int,
    batch_size: int,
    tokens_per_pass: int = 32768,
) -> Ranking:
    """Rank a gallery. `image_batches` yields this process's blocks, those of `own_blocks`, in order.

    k_test beyond the gallery is clamped. `tokens_per_pass` bounds the memory of scoring whatever the gallery's size.
    """
    texts = encode_texts(model, tokenize(captions), tokens_per_pass)
    images = encode_images(model, image_batches, num_images, batch_size)
    itc = shortlist(images.feat, texts.feat, k_test)
    codes = needed_pairs(itc)
    scores = score_pairs(model, images, texts, codes, tokens_per_pass)
    return Ranking(itc, add_scores(itc, codes, scores), len(codes))


def own_blocks(num_images: int, batch_size: int) -> list[range]:
    """Image indices of each block this process encodes and scores; blocks are dealt in turn."""
    starts = range(0, num_images, batch_size)
    return [range(i, min(i + batch_size, num_images)) for i in starts[get_rank() :: get_world_size()]]


# ---- encoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTexts:
    """All texts: features (M, E), and every token's state after layer 0's text part, text after text."""

    feat: Tensor
    lengths: np.ndarray  # (M,)
    start: np.ndarray  # (M,) row of a text's first token in `states`
    states: Tensor  # (sum of lengths, D)


@dataclass(frozen=True)
class EncodedImages:
    """Features of all images (N, E), tokens (b, n, V) of this process's blocks."""

    feat: Tensor
    blocks: list[range]
    tokens: list[Tensor]


def encode_texts(model: BLIP_Retrieval, texts: TokenizedText, tokens_per_pass: int) -> EncodedTexts:
    """Every process encodes all texts: 0.3 % of a COCO evaluation. Texts of one length go together, unpadded."""
    device, encoder = model.temp.device, model.text_encoder
    lengths = texts.attention_mask.sum(1).numpy()
    start = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    feat = torch.empty(len(lengths), model.text_proj.out_features, dtype=model.temp.dtype, device=device)
    states = None
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        for part in np.array_split(members, -(-len(members) * length // tokens_per_pass)):
            text = TokenizedText(*(x[part, :length].to(device) for x in texts))
            with model.autocast():
                states_cls = encoder(text, cls_only=True, padded=False)
                x = encoder.embeddings(as_match_input(text).input_ids)  # (P, length, D)
                x = encoder.encoder.layer[0].text_part(x, PaddedTexts(text.attention_mask, padded=False))
            if states is None:
                states = x.new_empty(int(lengths.sum()), x.shape[-1])
            feat[part] = model.text_feature(states_cls)
            rows = (start[part][:, None] + np.arange(length)).ravel()
            states[torch.from_numpy(rows).to(device)] = x.flatten(0, 1)
    return EncodedTexts(feat, lengths, start, states)


def encode_images(model: BLIP_Retrieval, batches: Iterable[Tensor], num_images: int, batch_size: int) -> EncodedImages:
    """Tokens stay on the GPU while they fit in half of its free memory, else in pinned host memory."""
    device = model.temp.device
    blocks = own_blocks(num_images, batch_size)
    feat = torch.zeros(num_images, model.vision_proj.out_features, dtype=model.temp.dtype, device=device)
    tokens = []
    progress = Progress("encode images", sum(len(block) for block in blocks), "images")
    for block, pixels in zip(blocks, batches, strict=True):
        encoded = model.encode_image(pixels.to(device, model.temp.dtype, non_blocking=True))
        feat[block.start : block.stop] = model.image_feature(encoded)
        tokens.append(encoded if _fits(encoded, len(blocks)) else _to_pinned(encoded))
        progress.add(len(block))
    return EncodedImages(all_reduce_sum(feat), blocks, tokens)


def _fits(block: Tensor, num_blocks: int) -> bool:
    if block.device.type != "cuda":
        return True
    return block.nbytes * num_blocks < torch.cuda.get_device_properties(block.device).total_memory // 2


def _to_pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


# ---- shortlists and the pairs they need ---------------------------------------------------------------------------


def shortlist(image_feat: Tensor, text_feat: Tensor, k_test: int) -> Shortlists:
    """The k_test best cosines of every image and of every text, in chunks: the N x M matrix never exists."""
    i2t = _top(image_feat, text_feat, k_test)
    t2i = _top(text_feat, image_feat, k_test)
    return Shortlists(*i2t, *t2i)


def _top(queries: Tensor, gallery: Tensor, k_test: int) -> tuple[np.ndarray, np.ndarray]:
    k = min(k_test, len(gallery))
    parts = [(chunk @ gallery.T).topk(k, dim=1) for chunk in queries.split(max(1, SIMILARITY_CHUNK // len(gallery)))]
    index = torch.cat([part.indices for part in parts]).int()
    return index.cpu().numpy(), torch.cat([part.values for part in parts]).cpu().numpy()


def needed_pairs(lists: Shortlists) -> np.ndarray:
    """The union of both directions' pairs as sorted codes image * M + text: (P,) int64."""
    num_texts = len(lists.t2i)
    i2t = np.arange(len(lists.i2t))[:, None] * num_texts + lists.i2t
    t2i = lists.t2i.astype(np.int64) * num_texts + np.arange(num_texts)[:, None]
    return np.unique(np.concatenate([i2t.ravel(), t2i.ravel()]))


def add_scores(lists: Shortlists, codes: np.ndarray, scores: np.ndarray) -> Shortlists:
    """Matching logit plus cosine for every shortlisted candidate."""
    num_texts = len(lists.t2i)
    i2t = np.arange(len(lists.i2t))[:, None] * num_texts + lists.i2t
    t2i = lists.t2i.astype(np.int64) * num_texts + np.arange(num_texts)[:, None]
    i2t_value = scores[np.searchsorted(codes, i2t)] + lists.i2t_value
    t2i_value = scores[np.searchsorted(codes, t2i)] + lists.t2i_value
    return Shortlists(lists.i2t, i2t_value, lists.t2i, t2i_value)


# ---- scoring ------------------------------------------------------------------------------------------------------


class PackedTexts:
    """Pairs of one pass without padding: tokens lie by text length, then by image (`models/med.py` runs the layers).

    Texts of one length form a rectangle for self-attention. Cross-attention has no mask per text, so all tokens that
    look at one image are a single query sequence against it.
    """

    def __init__(self, image: np.ndarray, lengths: np.ndarray, device: torch.device):
        """`image` (P,) in [0, m) and `lengths` (P,), in length order."""
        self.num_pairs = len(lengths)
        self.groups = [(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True), strict=True)]
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.first_token = torch.from_numpy(first).to(device)
        self.by_image = [_Order(image, device), _Order(np.repeat(image, lengths), device)]  # of pairs, of tokens

    def first(self, x: Tensor) -> Tensor:
        return x[self.first_token]  # (T, D) -> (P, D)

    def attend_text(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        sizes = [n * length for n, length in self.groups]
        q_sizes = [n for n, _ in self.groups] if len(q) == self.num_pairs else sizes
        parts = []
        for (n, _), *qkv in zip(self.groups, q.split(q_sizes), k.split(sizes), v.split(sizes), strict=True):
            heads_of = (split_heads(x.unflatten(0, (n, -1)), heads) for x in qkv)  # (n, H, length or 1, d)
            parts.append(merge_heads(F.scaled_dot_product_attention(*heads_of)).flatten(0, 1))
        return torch.cat(parts)

    def attend_image(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
        order = self.by_image[len(q) != self.num_pairs]
        k, v = split_heads(k, heads), split_heads(v, heads)  # (m, H, n, d)
        queries = order.sort(q).split(order.counts)
        parts = [
            merge_heads(F.scaled_dot_product_attention(split_heads(x[None], heads), k[i : i + 1], v[i : i + 1]))[0]
            for i, x in enumerate(queries)
        ]
        return order.unsort(torch.cat(parts))


class _Order:
    """Rows sorted by image and back."""

    def __init__(self, image: np.ndarray, device: torch.device):
        self.counts = np.bincount(image).tolist()
        order = np.argsort(image, kind="stable")
        self.trivial = len(self.counts) == 1
        self.index, self.inverse = (torch.from_numpy(x).to(device) for x in (order, np.argsort(order)))

    def sort(self, x: Tensor) -> Tensor:
        return x if self.trivial else x[self.index]

    def unsort(self, x: Tensor) -> Tensor:
        return x if self.trivial else x[self.inverse]


def score_pairs(
    model: BLIP_Retrieval, images: EncodedImages, texts: EncodedTexts, codes: np.ndarray, tokens_per_pass: int
) -> np.ndarray:
    """Matching logit of every pair code image * M + text, (P,); each process scores its own images."""
    num_texts = len(texts.lengths)
    scores = torch.zeros(len(codes), dtype=model.temp.dtype)
    spans = [np.searchsorted(codes, [block.start * num_texts, block.stop * num_texts]) for block in images.blocks]
    progress = Progress("re-rank", int(sum(end - begin for begin, end in spans)), "pairs")
    for block, tokens, (begin, end) in zip(images.blocks, images.tokens, spans, strict=True):
        image, text = np.divmod(codes[begin:end], num_texts)
        for part in _passes(texts.lengths[text], tokens_per_pass):
            scores[begin + part.start : begin + part.stop] = _score(
                model, tokens, image[part] - block.start, texts, text[part]
            )
            progress.add(part.stop - part.start)
    return all_reduce_sum(scores.to(model.temp.device)).cpu().numpy()


def _passes(lengths: np.ndarray, tokens_per_pass: int) -> Iterator[slice]:
    """Cut pairs into runs of about `tokens_per_pass` tokens."""
    ends = np.flatnonzero(np.diff(np.cumsum(lengths) // tokens_per_pass)) + 1
    for begin, end in pairwise([0, *ends.tolist(), len(lengths)]):
        if begin < end:
            yield slice(begin, end)


def _score(model: BLIP_Retrieval, tokens: Tensor, image: np.ndarray, texts: EncodedTexts, text: np.ndarray) -> Tensor:
    """One pass: pairs (image in the block, text) -> matching logit (P,) on the host."""
    device = model.temp.device
    present, image = np.unique(image, return_inverse=True)
    image_tokens = tokens[torch.from_numpy(present).to(tokens.device)].to(device, non_blocking=True)  # (m, n, V)
    order = np.lexsort((image, texts.lengths[text]))
    image, text = image[order], text[order]
    lengths = texts.lengths[text]
    packed = PackedTexts(image, lengths, device)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # place within the text
    x = texts.states[torch.from_numpy(np.repeat(texts.start[text], lengths) + offset).to(device)]  # (T, D)
    layers = model.text_encoder.encoder.layer
    with model.autocast():
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            if i > 0:
                x = layer.text_part(x, packed, cls_only=last)
            elif last:
                x = packed.first(x)
            x = layer.image_part(x, packed, image_tokens)
    scores = model.itm_head(x.to(model.itm_head.weight.dtype))[:, 1].cpu()
    return scores[torch.from_numpy(np.argsort(order))]


def score_matrices(
    model: BLIP_Retrieval, images: Tensor, captions: Sequence[str], k_test: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """BLIP's dense score matrices (N, M) and (M, N), -100 where a pair was not shortlisted; for small sets.

    images (N, 3, S, S); one process.
    """
    ranking = rerank(model, images.split(batch_size), len(images), captions, k_test, batch_size).itm
    i2t = np.full((len(images), len(captions)), -100.0, dtype=ranking.i2t_value.dtype)
    t2i = np.full((len(captions), len(images)), -100.0, dtype=ranking.t2i_value.dtype)
    np.put_along_axis(i2t, ranking.i2t.astype(np.int64), ranking.i2t_value, axis=1)
    np.put_along_axis(t2i, ranking.t2i.astype(np.int64), ranking.t2i_value, axis=1)
    return torch.from_numpy(i2t), torch.from_numpy(t2i)
