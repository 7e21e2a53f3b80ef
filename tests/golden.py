"""The recorded runs of the published code: load one, rebuild its model, and what a re-implementation must reproduce.

`assets/*.npz` were recorded from salesforce/BLIP commit 056a169 (CPU, float32, dropout 0, torch.multinomial replaced by
argmax, AdamW(1e-5, weight_decay 0.05)); `golden_inputs.py` rebuilds weights and pixels from names.
"""

import json
from pathlib import Path

import numpy as np
import torch

from configs.sizes import MedConfig
from models.blip_retrieval import BLIP_Retrieval
from tests.golden_inputs import checksum, fill, images
from training.step import StepReport

ASSETS = Path(__file__).parent / "assets"
LOSS_RTOL, GRAD_RTOL, PARAM_ATOL, QUEUE_ATOL = 2e-5, 1e-4, 5e-5, 1e-5
# Gradients of attention key biases are rounding noise (softmax ignores a shift), which AdamW turns into +-lr steps.
NOISE = ("key.bias", "qkv.bias")


class Golden:
    """One recorded run."""

    def __init__(self, name: str):
        self.name, self.data = name, np.load(ASSETS / f"{name}.npz")
        self.meta = json.loads(str(self.data["meta"]))

    def model(self, **overrides) -> BLIP_Retrieval:
        text = json.loads(str(self.data["text_config"]))
        known = {key: value for key, value in text.items() if key in MedConfig.__dataclass_fields__}
        kwargs = {
            "med_config": MedConfig(**known),
            "image_size": self.meta["image_size"],
            "vit": self.meta["vit"],
            "queue_size": self.meta.get("queue_size", 64),
            "negative_all_rank": self.meta.get("negative_all_rank", False),
        }
        model = BLIP_Retrieval(**{**kwargs, **overrides})
        fill(model.state_dict())
        return model

    @property
    def global_batch(self) -> int:
        return self.meta["batch_per_rank"] * self.meta["world"]

    def batch(
        self, step: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, list[str], torch.Tensor, float]:
        """Pixels, captions, ids and alpha of a step, all ranks in order."""
        pixels = images(f"{self.name}/im{step}", self.global_batch, self.meta["image_size"], self.meta["seed"])
        captions = [str(caption) for caption in self.data[f"captions_{step}"]]
        return pixels.to(dtype), captions, torch.tensor(self.data[f"idx_{step}"]), float(self.data[f"alpha_{step}"])


def losses_by_rank(report: StepReport) -> torch.Tensor:
    """(R, 2) loss_ita and loss_itm."""
    return torch.stack([report.by_rank[name] for name in ("loss_ita", "loss_itm")], dim=1)


def argmax_instead_of_sampling(monkeypatch) -> None:
    """The golden runs take the likeliest negative: Gumbel noise off."""
    monkeypatch.setattr("models.itm.gumbel", lambda shape, device, generator: torch.zeros(shape, device=device))


def gradient_deviation(model: torch.nn.Module, golden: Golden) -> float:
    """Largest relative deviation of a parameter's gradient norm, and of its checksum on the scale of the norm."""
    params, worst = dict(model.named_parameters()), 0.0
    for name, norm, dot in zip(*(golden.data[f"grad_{key}"] for key in ("names", "norm", "dot")), strict=True):
        if not name.endswith(NOISE):
            grad = params[name].grad
            scale = norm * np.linalg.norm(np.linspace(-1, 1, grad.numel())) if grad.dim() else abs(dot)
            worst = max(worst, abs(grad.double().norm().item() / norm - 1), abs(checksum(grad) - dot) / scale)
    return worst


def state_deviation(model: torch.nn.Module, golden: Golden) -> tuple[float, float]:
    """Largest deviation of a parameter's checksum and of a queue entry; ids and pointer must be equal."""
    state = model.state_dict()
    params = max(
        abs(checksum(state[name]) - dot)
        for name, dot in zip(golden.data["param_names"], golden.data["param_dot"], strict=True)
        if not name.endswith(NOISE)
    )
    queues = 0.0
    for which in ("image", "text"):
        head = golden.data[f"queue_head_{which}"]
        ours = state[f"{which}_queue"][: head.shape[0], : head.shape[1]].numpy()
        queues = max(queues, float(np.abs(ours - head).max()))
    np.testing.assert_array_equal(state["idx_queue"].numpy(), golden.data["idx_queue"])
    np.testing.assert_array_equal(state["ptr_queue"].numpy(), golden.data["ptr"])
    return params, queues
