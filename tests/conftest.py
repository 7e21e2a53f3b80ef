"""Tiny models and drawn data for every test; nothing here touches the network."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is a CPU suite; benchmarks cover the GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from models.blip_retrieval import BLIP_Retrieval
from models.med import MedConfig

WORDS = "a red blue green dog cat man woman on under near with table street ball the small large two running".split()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tiny_med(**overrides) -> MedConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return MedConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **overrides})


def tiny_model(dtype: torch.dtype = torch.float32, **overrides) -> BLIP_Retrieval:
    """A model of about 5 million parameters, most of them word embeddings, with weights far from their small init."""
    kwargs = {"med_config": tiny_med(), "image_size": 32, "vit": "nano", "embed_dim": 32, "queue_size": 64}
    model = BLIP_Retrieval(**{**kwargs, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(dtype)


def random_captions(count: int, generator: torch.Generator | None = None, longest: int = 12) -> list[str]:
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]
