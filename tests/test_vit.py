"""The image encoder against timm's own VisionTransformer, and activation checkpointing."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from torch.nn import functional as F

from models.arrangements import PlainTexts, TrainingTexts
from models.attention import training_attention
from models.vit import VisionTransformer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("vit", ["tiny", "nano"])
def test_equals_timm(vit):
    ours = VisionTransformer(vit, image_size=64).eval()
    width, depth, heads = {"tiny": (192, 12, 3), "nano": (96, 6, 3)}[vit]
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool=""
    ).eval()
    theirs.load_state_dict(ours.state_dict())  # the same names
    image = torch.randn(2, 3, 64, 64)
    tokens = ours(image)
    torch.testing.assert_close(tokens, theirs(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(image, cls_only=True), tokens[:, :1], atol=1e-5, rtol=1e-5)


def test_init_std_sets_the_spread_of_the_matrices_alone():
    torch.manual_seed(0)
    for std in (0.02, 0.06):
        vit = VisionTransformer("nano", 32, patch_size=8, init_std=std)
        weights = torch.cat([block.mlp.fc1.weight.flatten() for block in vit.blocks])
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        assert (
            vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.2) and vit.blocks[0].mlp.fc1.bias.abs().sum() == 0
        )


def test_pos_embed_std_sets_the_spread_of_the_position_embeddings_alone():
    for std in (0.02, 0.5):
        torch.manual_seed(0)
        vit = VisionTransformer("nano", 128, patch_size=8, pos_embed_std=std)
        assert vit.pos_embed.std().item() == pytest.approx(std, rel=0.05)
        assert vit.cls_token.abs().max() < 0.1 and vit.blocks[0].mlp.fc1.weight.std() < 0.03


def test_drop_path_rates_of_vit_large():
    with torch.device("meta"):
        blocks = VisionTransformer("large", image_size=64).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)])


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_leaves_gradients_bit_equal(autocast):
    image = torch.randn(2, 3, 32, 32)
    grads = []
    for grad_ckpt in (False, True):
        torch.manual_seed(1)
        vit = VisionTransformer("nano", 32, grad_ckpt=grad_ckpt, ckpt_layer=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tokens = vit(image)
        (tokens.float() ** 2).sum().backward()
        grads.append({name: p.grad for name, p in vit.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


def test_checkpointing_recomputes_only_the_last_blocks():
    vit = VisionTransformer("nano", 32, grad_ckpt=True, ckpt_layer=2)
    calls = [0] * len(vit.blocks)
    for i, block in enumerate(vit.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    vit(torch.randn(1, 3, 32, 32)).sum().backward()
    assert calls == [1, 1, 1, 1, 2, 2]


def test_what_fairscale_warns_of_in_vain_is_not_said():
    """Its old name of autocast, and a first recomputed block behind frozen ones. Other warnings stay."""
    code = """
import warnings
from models.vit import VisionTransformer
import torch
model = VisionTransformer("nano", 32, grad_ckpt=True, ckpt_layer=1)
model(torch.randn(2, 3, 32, 32)).sum().backward()
for name, parameter in model.named_parameters():
    parameter.requires_grad_("blocks.5." in name)
model(torch.randn(2, 3, 32, 32)).sum().backward()
text = "`torch.cuda.amp.autocast(args...)` is deprecated."
warnings.warn_explicit(text, FutureWarning, "a.py", 1, module="elsewhere")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("Warning") == 1 and "a.py:1" in done.stderr, done.stderr


def test_recomputed_blocks_behind_frozen_ones_get_their_gradients():
    """The first recomputed block's input needs no gradient, of which fairscale says that gradients will be None."""
    pixels, gradients = torch.randn(2, 3, 32, 32), []
    for grad_ckpt in (True, False):
        torch.manual_seed(0)
        vit = VisionTransformer("nano", 32, grad_ckpt=grad_ckpt, ckpt_layer=2).train()
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(name.startswith(("blocks.4.", "blocks.5.", "norm.")))
        vit(pixels).sum().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters() if p.requires_grad})
    for name, grad in gradients[1].items():
        assert torch.equal(gradients[0][name], grad), name


def test_training_in_bfloat16_attends_in_float32_on_a_cpu():
    """What is asked of torch's kernel, with a graph and without; and evaluation stays in bfloat16."""
    q = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([[True, True, True, True, False]])
    expected = F.scaled_dot_product_attention(q.float(), q.float(), q.float(), attn_mask=mask).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                context = training_attention(q, q, q, mask)
            assert context.dtype == torch.bfloat16 and torch.equal(context, expected)
    training_attention(q, q, q, mask).float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.bfloat16

    vit = VisionTransformer("nano", 32)
    for training, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        kernel = mock.patch.object(F, "scaled_dot_product_attention", side_effect=lambda q, k, v, **_: q)
        with kernel as spy, torch.autocast("cpu", torch.bfloat16):
            vit.train(training)(torch.randn(1, 3, 32, 32))
        assert [call.args[0].dtype for call in spy.call_args_list] == [dtype] * 6

    x, states = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(1, 3, 8, dtype=torch.bfloat16)
    for texts, dtype in ((TrainingTexts([2, 2], x.device, [0, 0], 1), torch.float32), (PlainTexts(None), x.dtype)):
        own = x if dtype == torch.float32 else x[None]
        with mock.patch.object(F, "scaled_dot_product_attention", side_effect=lambda q, k, v, *_, **__: q) as spy:
            texts.attend_text(own, own, own, 2, 0.0)
            texts.attend_image(own, states, states, 2, 0.0)
        assert [call.args[0].dtype for call in spy.call_args_list] == [dtype] * 2
