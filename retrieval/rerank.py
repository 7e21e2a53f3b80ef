"""Evaluation: contrast picks shortlists both ways, matching re-ranks them; each needed (image, text) pair once.

The protocol is BLIP's (`evaluation` in its train_retrieval.py): score = matching logit + cosine, for the k_test best
cosines of each query. The order of work is not: pairs of both directions are united and grouped by image, so that an
image's keys and values are computed once; texts are packed by exact length, so that nothing is padded; the last layer
computes [ENC] alone; what layer 0 does before it sees the image is done once per text; captions with the same tokens
are one text. All of it is exact. (`scoring.py` scores the pairs.)

Under bf16 the encoders still compute in float32, which costs a thirtieth of the pairs' arithmetic and keeps float32's
shortlists; pairs are scored in bfloat16, and again in float32 where Recall@K could depend on it (`recheck.py`).

Blocks of `batch_size` images are dealt to the processes and passes never cross a block, so results do not depend on the
number of processes. Memory: image tokens, on the GPU or in pinned host memory; all texts' states after layer 0; one
pass; and on the host about 100 bytes for each pair.

Shapes: N images, M captions, U distinct texts, P pairs, k shortlist, n image tokens, V image width, D text width,
E embedding width, b images of a block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.arrangements import PlainTexts, on_device, ranges
from models.blip_retrieval import BLIP_Retrieval, as_match_input
from retrieval.pinned import PinnedBlocks
from retrieval.recheck import Queries, recheck_in_float32
from retrieval.scoring import EncodedImages, EncodedTexts, score_pairs
from transform.text import TokenizedText
from utils import Progress, all_reduce_sum, get_rank, get_world_size, never_stop

SIMILARITY_CHUNK = 1 << 23  # cosines held at once while shortlisting


@dataclass(frozen=True)
class Shortlists:
    """Both directions' best candidates and their values: i2t (N, k), t2i (M, k)."""

    i2t: np.ndarray  # caption indices
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
    image_ids: np.ndarray | None = None,
    text_ids: np.ndarray | None = None,
    poll: Callable[[], None] = never_stop,
) -> Ranking:
    """Re-rank a gallery. `image_batches` yields this process's blocks, those of `own_blocks`, in order.

    k_test beyond the gallery is clamped. `tokens_per_pass` bounds the memory of scoring whatever the gallery's size.
    A caption is right for an image iff their ids are equal; the ids (N,) and (M,) are used under bf16 alone, to find
    the pairs that Recall depends on. Without them bf16 scores stay as they are. `poll` is called before each pass and
    may raise to leave.
    """
    with _in_float32(model):
        texts = encode_texts(model, model.tokenizer.tokenize(captions), tokens_per_pass, poll)
        images = encode_images(model, image_batches, num_images, batch_size, poll)
    ids = None if image_ids is None or text_ids is None else (image_ids, text_ids)
    return rerank_encoded(model, images, texts, k_test, tokens_per_pass, ids, poll)


def rerank_encoded(
    model: BLIP_Retrieval,
    images: EncodedImages,
    texts: EncodedTexts,
    k_test: int,
    tokens_per_pass: int,
    ids: tuple[np.ndarray, np.ndarray] | None = None,
    poll: Callable[[], None] = never_stop,
) -> Ranking:
    """Shortlists, the pairs they need, and their scores; `ids` and `poll` as in `rerank`."""
    itc = shortlist(images.feat, texts.feat, texts.distinct, k_test)
    pairs = needed_pairs(itc, texts.distinct)
    scores = score_pairs(model, images, texts, pairs.image, pairs.text, tokens_per_pass, poll)
    if model.autocast_dtype is not None and ids is not None:
        image_ids, text_ids = ids
        i2t = Queries(pairs.i2t, itc.i2t_value, text_ids[itc.i2t] == image_ids[:, None])
        t2i = Queries(pairs.t2i, itc.t2i_value, image_ids[itc.t2i] == text_ids[:, None])

        def rescore(some: np.ndarray) -> np.ndarray:
            with _in_float32(model):
                return score_pairs(model, images, texts, pairs.image[some], pairs.text[some], tokens_per_pass, poll)

        scores = recheck_in_float32(scores, [i2t, t2i], rescore)
    itm = Shortlists(itc.i2t, scores[pairs.i2t] + itc.i2t_value, itc.t2i, scores[pairs.t2i] + itc.t2i_value)
    return Ranking(itc, itm, len(scores))


@contextmanager
def _in_float32(model: BLIP_Retrieval) -> Iterator[None]:
    """bf16 off inside; fp32 and tf32 stay what they are."""
    before, model.autocast_dtype = model.autocast_dtype, None
    try:
        yield
    finally:
        model.autocast_dtype = before


def own_blocks(num_images: int, batch_size: int) -> list[range]:
    """Image indices of each block this process encodes and scores; blocks are dealt in turn."""
    starts = range(0, num_images, batch_size)
    return [range(i, min(i + batch_size, num_images)) for i in starts[get_rank() :: get_world_size()]]


# ---- encoding -----------------------------------------------------------------------------------------------------


def encode_texts(
    model: BLIP_Retrieval, captions: TokenizedText, tokens_per_pass: int, poll: Callable[[], None] = never_stop
) -> EncodedTexts:
    """Every process encodes all texts: 0.3 % of a COCO evaluation. Texts of one length go together, unpadded."""
    device, encoder = model.temp.device, model.text_encoder
    _, first, distinct = np.unique(captions.input_ids.numpy(), axis=0, return_index=True, return_inverse=True)
    ids = captions.input_ids.numpy()[first]  # (U, L), padded
    lengths = captions.attention_mask.sum(1).numpy()[first]  # (U,)
    start = np.cumsum(lengths) - lengths  # (U,) each text's first row of `states`
    feat = torch.empty(len(lengths), model.text_proj.out_features, dtype=model.temp.dtype, device=device)
    states = torch.empty(int(lengths.sum()), encoder.config.hidden_size, dtype=model.temp.dtype, device=device)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        for part in np.array_split(members, -(-len(members) * length // tokens_per_pass)):
            poll()
            input_ids = on_device(device, ids[part, :length])  # (P, length)
            text = TokenizedText(input_ids, torch.ones_like(input_ids))
            with model.autocast():
                unpadded = PlainTexts(attention_mask=None)
                states_cls = encoder(text, arrangement=unpadded, cls_only=True)  # (P, 1, D)
                x = encoder.embeddings(as_match_input(text, model.tokenizer.enc).input_ids)  # (P, length, D)
                x = encoder.encoder.layer[0].text_part(x, unpadded)
            feat[on_device(device, part)] = model.text_feature(states_cls)
            states[on_device(device, ranges(start[part], lengths[part]))] = x.flatten(0, 1).to(states.dtype)
    return EncodedTexts(feat, distinct.reshape(-1), lengths, start, states)


def encode_images(
    model: BLIP_Retrieval,
    batches: Iterable[Tensor],
    num_images: int,
    batch_size: int,
    poll: Callable[[], None] = never_stop,
) -> EncodedImages:
    """Tokens stay on the GPU when they take less than half of its free memory, else they go to pinned host memory."""
    device = model.temp.device
    blocks = own_blocks(num_images, batch_size)
    feat = torch.zeros(num_images, model.vision_proj.out_features, dtype=model.temp.dtype, device=device)
    tokens, stay, pinned = [], None, PinnedBlocks(len(blocks))
    progress = Progress("encode images", sum(len(block) for block in blocks), "images")
    for block, pixels in zip(blocks, batches, strict=True):
        poll()
        encoded = model.encode_image(pixels.to(device, model.temp.dtype, non_blocking=True))
        feat[block.start : block.stop] = model.image_feature(encoded)
        if stay is None:
            stay = _fits(encoded.nbytes * len(blocks), device)
        tokens.append(encoded if stay else pinned.take(encoded))
        progress.add(len(block))
    if not stay and device.type == "cuda":
        torch.cuda.synchronize(device)  # the copies to the host have arrived
    return EncodedImages(all_reduce_sum(feat), blocks, tokens)


def _fits(nbytes: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes < (torch.cuda.mem_get_info(device)[0] + cached) // 2


# ---- shortlists and the pairs they need ---------------------------------------------------------------------------


def shortlist(image_feat: Tensor, text_feat: Tensor, distinct: np.ndarray, k_test: int) -> Shortlists:
    """The k_test best cosines of every image and of every caption: features (N, E) and (U, E), `distinct` (M,).

    Works in chunks: the N x M matrix never exists. Captions of one text have the same cosine, to the last bit.
    """
    columns = on_device(text_feat.device, distinct)
    i2t, i2t_value = _top(image_feat, text_feat, k_test, columns)
    t2i, t2i_value = _top(text_feat, image_feat, k_test)
    return Shortlists(i2t, i2t_value, t2i[distinct], t2i_value[distinct])


def _top(queries: Tensor, gallery: Tensor, k_test: int, columns: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values (Q, k) of the best candidates, which are the gallery or, in this order, its `columns`."""
    size = len(gallery) if columns is None else len(columns)
    parts = []
    for chunk in queries.split(max(1, SIMILARITY_CHUNK // size)):
        cosines = chunk @ gallery.T  # (queries of the chunk, gallery)
        parts.append((cosines if columns is None else cosines[:, columns]).topk(min(k_test, size), dim=1))
    index = torch.cat([part.indices.int() for part in parts])
    return index.cpu().numpy(), torch.cat([part.values for part in parts]).cpu().numpy()


@dataclass(frozen=True)
class Pairs:
    """The pairs (image, distinct text) that the shortlists need, each once, in image order; each candidate's pair."""

    image: np.ndarray  # (P,)
    text: np.ndarray  # (P,)
    i2t: np.ndarray  # (N, k) index of the pair
    t2i: np.ndarray  # (M, k)


def needed_pairs(lists: Shortlists, distinct: np.ndarray) -> Pairs:
    """The union of both directions' pairs; `distinct` (M,) maps captions to texts."""
    num_texts = int(distinct.max()) + 1
    i2t = np.arange(len(lists.i2t))[:, None] * num_texts + distinct[lists.i2t]  # (N, k)
    t2i = lists.t2i.astype(np.int64) * num_texts + distinct[:, None]  # (M, k)
    codes = torch.from_numpy(np.concatenate([i2t.ravel(), t2i.ravel()]))
    codes, pair = torch.unique(codes, return_inverse=True)  # sorted; far faster than numpy's
    image, text = (x.astype(np.int32) for x in np.divmod(codes.numpy(), num_texts))
    pair = pair.int().numpy()  # (N * k + M * k,)
    return Pairs(image, text, pair[: i2t.size].reshape(i2t.shape), pair[i2t.size :].reshape(t2i.shape))


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
