"""Recall@K from shortlists, as pure numpy functions.

A candidate is right when its id equals the query's: several captions of an image, and several images of one id, are all
right answers. An item without any right answer in the gallery is a distractor: a candidate, but no query. The place of
a query's answer is the number of candidates that score better than the best right one; on a
tie the lower gallery index comes first. A right answer outside the shortlist is not found at any K. (BLIP sorts whole
rows with numpy's unstable argsort, so its ties are undefined; without ties the numbers are the same.)

Shapes: Q queries, G gallery, k shortlist.
"""

from math import comb

import numpy as np

KS = (1, 5, 10)  # the K of Recall@K
NOISE_SIGMAS = 2.0  # a Recall nearer to chance than so many deviations may be luck
NOT_FOUND = np.iinfo(np.int64).max


def places(candidates: np.ndarray, scores: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> np.ndarray:
    """0-based place of the best right answer of each query: candidates and scores (Q, k) -> (Q,) int64."""
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are not finite: the weights are broken "
            "(a diverged run, or a checkpoint that does not fit), so no Recall exists."
        )
    candidates = candidates.astype(np.int64)  # NOT_FOUND has no place among 32-bit indices
    right = gallery_ids[candidates] == query_ids[:, None]  # (Q, k)
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)  # (Q, 1)
    first = np.where(right & (scores == best), candidates, NOT_FOUND).min(1, keepdims=True)  # (Q, 1) gallery index
    ahead = (scores > best) | ((scores == best) & (candidates < first))  # (Q, k)
    return np.where(right.any(1), ahead.sum(1), NOT_FOUND)


def recall(place: np.ndarray, prefix: str) -> dict[str, float]:
    """Percent of queries whose best right answer is among the first K: {prefix_r1, _r5, _r10, _r_mean}."""
    values = {f"{prefix}_r{k}": 100.0 * float(np.mean(place < k)) for k in KS}
    return {**values, f"{prefix}_r_mean": sum(values.values()) / len(KS)}


def retrieval_metrics(
    i2t: np.ndarray,
    i2t_score: np.ndarray,
    t2i: np.ndarray,
    t2i_score: np.ndarray,
    image_ids: np.ndarray,
    text_ids: np.ndarray,
) -> dict[str, float]:
    """BLIP's nine numbers: txt_* finds texts for images, img_* images for texts; r_mean is the mean of both means."""
    txt = recall(places(i2t, i2t_score, image_ids, text_ids)[np.isin(image_ids, text_ids)], "txt")
    img = recall(places(t2i, t2i_score, text_ids, image_ids)[np.isin(text_ids, image_ids)], "img")
    return {**txt, **img, "r_mean": (txt["txt_r_mean"] + img["img_r_mean"]) / 2}


def chance_metrics(image_ids: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """The same nine numbers for a random order of the gallery, in expectation."""
    txt = _chance(image_ids, text_ids, "txt")
    img = _chance(text_ids, image_ids, "img")
    return {**txt, **img, "r_mean": (txt["txt_r_mean"] + img["img_r_mean"]) / 2}


def recall_table(name: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table of Recall@K in percent; `rows` by their title."""
    ks = "".join(f"{f'R@{k}':>8}" for k in KS)
    lines = [f"{name:18} {'image -> text':>24}  {'text -> image':>24}", f"{'Recall, %':18} {ks}  {ks}  {'mean':>8}"]
    for title, metrics in rows.items():
        txt, img = ("".join(f"{metrics[f'{way}_r{k}']:8.2f}" for k in KS) for way in ("txt", "img"))
        lines.append(f"{title:18} {txt}  {img}  {metrics['r_mean']:8.2f}")
    return lines


def within_noise(metrics: dict[str, float], num_images: int, num_texts: int) -> bool:
    """Whether R@1 and R@10 of both directions are what a random order gives, of `{key}` and `chance_{key}` in percent.

    Binomial: a random order's Recall over Q queries has the deviation sqrt(p (1 - p) / Q). Galleries so small that
    chance is 100 % tell nothing and do not count.
    """
    told = False
    for way, queries in (("txt", num_images), ("img", num_texts)):
        for key in (f"{way}_r1", f"{way}_r10"):
            got, chance = metrics[key] / 100, metrics[f"chance_{key}"] / 100
            deviation = (max(chance * (1 - chance), 0.0) / queries) ** 0.5
            if deviation < 1e-6:
                continue
            if abs(got - chance) >= NOISE_SIGMAS * deviation:
                return False
            told = True
    return told


def _chance(query_ids: np.ndarray, gallery_ids: np.ndarray, prefix: str) -> dict[str, float]:
    query_ids = query_ids[np.isin(query_ids, gallery_ids)]
    ids, counts = np.unique(gallery_ids, return_counts=True)
    right = counts[np.searchsorted(ids, query_ids)]  # (Q,) right answers of each query
    total = len(gallery_ids)
    values = {}
    for k in KS:
        # P(none of the first K is right) = C(total - g, K) / C(total, K)
        hit = {g: 1 - comb(total - g, min(k, total)) / comb(total, min(k, total)) for g in np.unique(right).tolist()}
        values[f"{prefix}_r{k}"] = 100.0 * float(np.mean([hit[g] for g in right.tolist()]))
    return {**values, f"{prefix}_r_mean": sum(values.values()) / len(KS)}
