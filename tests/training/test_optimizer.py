import pytest
import torch
from torch import nn

from mrl.backbones import build_backbone
from mrl.models import build_model, freeze
from mrl.training.optimizer import build_optimizer


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
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 1e-4)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.head.parameters()
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_named_optimizer_is_torchs(name):
    model = build_model(build_backbone("resnet10t"), 5)
    optimizer = build_optimizer(model, name, 0.1, 0.8, 1e-4)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    if name == "sgd":
        assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.8, False)}
