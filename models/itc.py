"""Image-text contrast with momentum targets: pure functions of features.

Sources: Li et al. 2021 (ALBEF, arXiv 2107.07651, section 3.2 and 3.3), BLIP's `models/blip_retrieval.py`.

Shapes: m images or texts whose loss is wanted, b samples of their rank, Q queue size, E embedding width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EMPTY = -100  # id of a queue slot that nothing was written to yet


def similarities(feat: Tensor, own_m: Tensor, queue: Tensor) -> Tensor:
    """Cosines with the other modality's momentum features: first of the sample's rank, then in the queue.

    feat (m, E), own_m (m, b, E) those of each sample's rank, queue (E, Q) -> (m, b + Q).
    """
    return torch.cat([torch.einsum("me,mbe->mb", feat, own_m), feat @ queue], dim=1)


def positives(idx: Tensor, own_idx: Tensor, idx_queue: Tensor) -> Tensor:
    """Uniform mass over columns that show the same image: idx (m,), own_idx (m, b), idx_queue (1, Q) -> (m, b + Q)."""
    columns = torch.cat([own_idx, idx_queue.expand(len(idx), -1)], dim=1)
    same = (columns == idx[:, None]).float()
    return same / same.sum(1, keepdim=True)


def soft_targets(sim_m: Tensor, positive: Tensor, temp: Tensor, alpha: float) -> Tensor:
    """alpha parts of what the momentum encoders predict, the rest the positives; all (m, b + Q)."""
    return alpha * F.softmax(sim_m / temp, dim=1) + (1 - alpha) * positive


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, one value each: (m, C), (m, C) -> (m,)."""
    return -(F.log_softmax(logits, dim=1) * targets).sum(1)


def contrastive_loss(sim: Tensor, sim_m: Tensor, positive: Tensor, temp: Tensor, alpha: float) -> Tensor:
    """One value for each image or text, (m,), of online and momentum cosines and positives, all (m, b + Q)."""
    with torch.no_grad():
        targets = soft_targets(sim_m, positive, temp, alpha)
    return soft_cross_entropy(sim / temp, targets)
