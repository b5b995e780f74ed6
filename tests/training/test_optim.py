import itertools
import math

import pytest
import torch
from torch import nn

from mrl.config import DataConfig
from mrl.model import build_backbone, build_model, freeze
from mrl.training.optim import build_optimizer, lr_at, set_lr, shorten_warmup


def decayed_names(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )
    return {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}


def test_fault_08_every_batchnorm_is_spared_weight_decay_also_in_downsampling():
    model = build_model(build_backbone("resnet50"), 5)
    decayed = decayed_names(model, build_optimizer(model, "sgd", 0.1, 0.9, 1e-4))
    spared = {name for name, _ in model.named_parameters()} - decayed
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert "backbone.layer1.0.downsample.1.weight" in spared
    assert spared == norms | biases


def test_a_vits_position_embedding_and_class_token_are_spared_too():
    model = build_model(build_backbone("vit_tiny_patch16_224"), 5)
    decayed = decayed_names(model, build_optimizer(model, "adamw", 0.1, 0.9, 0.05))
    assert "backbone.patch_embed.proj.weight" in decayed
    assert not {"backbone.pos_embed", "backbone.cls_token"} & decayed


def test_frozen_parameters_are_not_optimized():
    model = build_model(build_backbone("resnet10t"), 5)
    freeze(model, "head")
    groups = build_optimizer(model, "sgd", 0.1, 0.9, 1e-4).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.head.parameters()}


def test_the_named_optimizer_is_torchs_at_the_rate_itself():
    model = build_model(build_backbone("resnet10t"), 5)
    sgd, adamw = (build_optimizer(model, name, 0.1, 0.8, 1e-4) for name in ("sgd", "adamw"))
    assert type(sgd) is torch.optim.SGD and type(adamw) is torch.optim.AdamW
    set_lr(sgd, 0.123456789)
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.123456789, 0.8, False)}


def test_layer_decay_slows_each_layer_by_its_distance_from_the_head():
    """Two blocks: stem, block 0, block 1 with the final norm, head."""
    model = build_model(build_backbone("vit_tiny_patch16_224", kwargs={"depth": 2}), 5)
    plain = build_optimizer(model, "adamw", 0.1, 0.9, 0.05)
    optimizer = build_optimizer(model, "adamw", 0.1, 0.9, 0.05, layer_decay=0.5)
    assert decayed_names(model, optimizer) == decayed_names(model, plain)
    set_lr(optimizer, 0.8)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_layer = {"head.": 0.8, "backbone.blocks.1.": 0.4, "backbone.norm.": 0.4, "backbone.blocks.0.": 0.2}
    for name, parameter in model.named_parameters():
        expected = next((rate for prefix, rate in by_layer.items() if name.startswith(prefix)), 0.1)
        assert lr[id(parameter)] == pytest.approx(expected), name


def test_the_papers_schedule_at_its_knots():
    steps_per_epoch, epochs, peak = 1251, 40, 0.425
    total, warmup = epochs * steps_per_epoch, 2 * steps_per_epoch
    lr = [lr_at(step, total, warmup, peak) for step in range(total)]
    assert lr[0] == pytest.approx(peak / warmup)
    assert lr[warmup - 1] == lr[warmup] == max(lr) == peak
    assert lr[(warmup + total) // 2] == pytest.approx(peak / 2, rel=1e-3)
    assert 0 < lr[-1] == pytest.approx(peak / (total - warmup))
    rises = [later - earlier for earlier, later in itertools.pairwise(lr)]
    assert all(rise > 0 for rise in rises[: warmup - 1]) and all(rise < 0 for rise in rises[warmup:])
    px = [DataConfig(train_px=[(0, 160), (32, 192)]).px_at(epoch) for epoch in range(epochs)]
    assert px == [160] * 32 + [192] * 8 and DataConfig(train_px=64).px_at(7) == 64
    lr = [lr_at(step, 100, 0, 2.0, "cosine") for step in range(100)]
    assert lr == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


@pytest.mark.parametrize(("epochs", "expected"), [(40, 2), (3, 2), (2, 1), (1, 0.5)])
def test_a_warmup_as_long_as_the_run_takes_half_of_it(epochs, expected):
    assert shorten_warmup(2.0, epochs) == expected
