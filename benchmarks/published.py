"""The published algorithms written plainly, on this repository's weights: what fast paths are timed and tested by.

Source: the semantics of salesforce/BLIP's `models/blip_retrieval.py` and `train_retrieval.py` (commit 056a169). Nothing
is shared with the fast paths but the layers: one pass for each purpose, padding to 35 tokens, image tokens repeated for
every pair, a loop for every draw.

Shapes: R ranks, b samples a rank, N images, M texts, E embedding width, Q queue size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.blip_retrieval import BLIP_Retrieval, as_match_input
from transform.text import MAX_TOKENS, TokenizedText


def pad_to_35(text: TokenizedText) -> TokenizedText:
    return TokenizedText(*(F.pad(x, (0, MAX_TOKENS - x.shape[1])) for x in text))


def multinomial_loop(weights: Tensor) -> list[int]:
    """One draw for each sample (b, c), each of which waits for the device."""
    return [torch.multinomial(candidates, 1).item() for candidates in weights]


@torch.no_grad()
def momentum_loop(model: BLIP_Retrieval) -> None:
    """The momentum update, one parameter at a time."""
    for online, twin in model.twins():
        for p, p_m in zip(online.parameters(), twin.parameters(), strict=True):
            p_m.data = p_m.data * model.momentum + p.data * (1.0 - model.momentum)


def published_step(
    model: BLIP_Retrieval,
    image: Tensor,
    text: TokenizedText,
    idx: Tensor,
    alpha: float,
    ranks: int = 1,
    draw=multinomial_loop,
) -> list[tuple[Tensor, Tensor]]:
    """(loss_ita, loss_itm) of each rank with its graph; the mean over ranks is what distributed training minimises."""
    with torch.no_grad():
        model.temp.clamp_(0.001, 0.5)
    text = pad_to_35(text)
    image_tokens = model.encode_image(image)  # of all ranks: gathering keeps the graph
    image_feat = model.image_feature(image_tokens)
    with model.autocast():
        text_states = model.text_encoder(text)
    text_feat = model.text_feature(text_states)
    with torch.no_grad():
        momentum_loop(model)
        with model.autocast():
            image_states, text_states = model.visual_encoder_m(image)[:, 0], model.text_encoder_m(text)[:, 0]
        image_feat_m = F.normalize(model.vision_proj_m(image_states.to(image.dtype)), dim=-1)
        text_feat_m = F.normalize(model.text_proj_m(text_states.to(image.dtype)), dim=-1)
    image_queue, text_queue, idx_queue = (q.clone() for q in (model.image_queue, model.text_queue, model.idx_queue))
    model.enqueue(image_feat_m, text_feat_m, idx)

    losses, b = [], len(image) // ranks
    for rank in range(ranks):
        own = slice(rank * b, (rank + 1) * b)
        image_all = torch.cat([image_feat_m[own].T, image_queue], dim=1)  # (E, b + Q)
        text_all = torch.cat([text_feat_m[own].T, text_queue], dim=1)
        with torch.no_grad():
            same = torch.eq(idx[own, None], torch.cat([idx[own][None], idx_queue], dim=1)).float()
            same = same / same.sum(1, keepdim=True)
            i2t_targets = alpha * F.softmax(image_feat_m[own] @ text_all / model.temp, 1) + (1 - alpha) * same
            t2i_targets = alpha * F.softmax(text_feat_m[own] @ image_all / model.temp, 1) + (1 - alpha) * same
        i2t, t2i = image_feat[own] @ text_all / model.temp, text_feat[own] @ image_all / model.temp
        loss_i2t = -(F.log_softmax(i2t, 1) * i2t_targets).sum(1).mean()
        loss_t2i = -(F.log_softmax(t2i, 1) * t2i_targets).sum(1).mean()
        pool = slice(0, len(image)) if model.negative_all_rank else own
        loss_itm = _matching(model, own, pool, image_tokens, image_feat, text_feat, text, idx, draw)
        losses.append(((loss_i2t + loss_t2i) / 2, loss_itm))
    return losses


def _matching(model, own, pool, image_tokens, image_feat, text_feat, text, idx, draw) -> Tensor:
    """Three pairs a sample in two passes: positives, then (text, drawn image) and (drawn text, image)."""
    with torch.no_grad():
        mask = idx[own, None] == idx[pool]
        weights_i2t = F.softmax(image_feat[own] @ text_feat[pool].T / model.temp, dim=1).masked_fill(mask, 0)
        weights_t2i = F.softmax(text_feat[own] @ image_feat[pool].T / model.temp, dim=1).masked_fill(mask, 0)
    drawn_images, drawn_texts = draw(weights_t2i), draw(weights_i2t)
    images_neg = torch.stack([image_tokens[pool][i] for i in drawn_images])
    text = as_match_input(text)
    texts_neg = [torch.stack([x[pool][i] for i in drawn_texts]) for x in text]
    texts_own = [x[own] for x in text]
    with model.autocast():
        positive = model.text_encoder(TokenizedText(*texts_own), image_tokens[own])[:, 0]
        texts = TokenizedText(*(torch.cat(pair) for pair in zip(texts_own, texts_neg, strict=True)))
        negative = model.text_encoder(texts, torch.cat([images_neg, image_tokens[own]]))[:, 0]
    states = torch.cat([positive, negative]).to(model.itm_head.weight.dtype)
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long().to(states.device)
    return F.cross_entropy(model.itm_head(states), labels)


@torch.no_grad()
def published_matrices(model: BLIP_Retrieval, image: Tensor, text: TokenizedText, k_test: int) -> tuple[Tensor, Tensor]:
    """Dense score matrices (N, M), (M, N): each query against its own shortlist, one query at a time."""
    text = pad_to_35(text)
    image_tokens = model.encode_image(image)
    image_feat, text_feat = model.image_feature(image_tokens), model.text_feature(model.text_encoder(text))
    sims = image_feat @ text_feat.T
    text = as_match_input(text)
    i2t, t2i = torch.full_like(sims, -100), torch.full_like(sims.T, -100)
    for i, row in enumerate(sims):
        value, top = row.topk(min(k_test, len(row)))
        i2t[i, top] = value + pair_scores(model, image_tokens[i].expand(len(top), -1, -1), text, top)
    for t, row in enumerate(sims.T):
        value, top = row.topk(min(k_test, len(row)))
        t2i[t, top] = value + pair_scores(model, image_tokens[top], text, torch.full_like(top, t))
    return i2t, t2i


def pair_scores(model: BLIP_Retrieval, image_tokens: Tensor, text: TokenizedText, which: Tensor) -> Tensor:
    """Matching logit of pairs: image tokens (P, n, V) and text indices (P,) -> (P,)."""
    with model.autocast():
        states = model.text_encoder(TokenizedText(*(x[which] for x in text)), image_tokens)[:, 0]
    return model.itm_head(states.to(model.itm_head.weight.dtype))[:, 1]
