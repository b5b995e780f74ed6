import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from mrl.studies.geometry import default_layer, grad_cams

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(name, dims, kwargs=None, px=32):
    torch.manual_seed(0)
    model = build_model(build_backbone(name, "scratch", 2 if kwargs is None else 4, False, kwargs or {}), 5, dims)
    model.train()(torch.randn(8, 3, px, px))  # BatchNorms that saw data
    return model.eval()


def classifiers_of(model):
    return [model.head.weight_and_bias(g) for g in range(len(model.head.nesting_list))]


def slow_cam(model, layer, image, g, target):
    """Grad-CAM by its definition, one image: channels weighed by their mean gradient, then a ReLU, up and to 0..1."""
    kept = {}
    hook = model.backbone.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.update(map=output))
    logit = model(image[None])[g, 0, target]
    hook.remove()
    [gradient] = torch.autograd.grad(logit, kept["map"])
    heat = (gradient.mean(dim=(2, 3), keepdim=True) * kept["map"]).sum(dim=1).relu().detach()
    heat = F.interpolate(heat[None], image.shape[1:], mode="bilinear")[0, 0]
    return ((heat - heat.min()) / (heat.max() - heat.min())).numpy()


@pytest.fixture(autouse=True)
def _needs_grad_cam(request):
    if "missing" not in request.node.name:
        pytest.importorskip("pytorch_grad_cam")


def test_it_is_the_gradient_of_each_prefixs_own_classifier():
    model = small("test_resnet", (8, 32, 96))
    images, targets = torch.randn(2, 3, 32, 32), np.array([[0, 1], [2, 3], [4, 0]])
    layer = default_layer(model, 32)
    heat = grad_cams(model, images, classifiers_of(model), targets)
    assert heat.shape == (3, 2, 32, 32)
    for g in range(3):
        for i in range(2):
            expected = slow_cam(model, layer, images[i], g, targets[g, i])
            np.testing.assert_allclose(heat[g, i], expected, atol=1e-3)
    assert np.abs(heat[0] - heat[2]).max() > 0.1
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())


def test_the_layer_is_the_last_with_maps_of_four_by_four_or_more():
    model = small("test_resnet", (8, 96))
    names = [stage["module"] for stage in model.backbone.feature_info]
    sides = {}
    for name in names:
        model.backbone.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: sides.update({name: output.shape[-1]})
        )
    with torch.no_grad():
        model.embed(torch.zeros(1, 3, 32, 32))
    assert default_layer(model, 32) == [name for name in names if sides[name] >= 4][-1]
    assert default_layer(model, 32) != names[-1] or sides[names[-1]] >= 4
    with pytest.raises(UserError, match="no stage of this backbone"):
        default_layer(model, 3)


def test_tokens_of_a_transformer_become_a_map():
    model = small("vit_tiny_patch16_224", (8, 32), VIT)
    heat = grad_cams(model, torch.randn(1, 3, 32, 32), classifiers_of(model), np.array([[0], [1]]), "blocks.0.norm1")
    assert heat.shape == (2, 1, 32, 32) and np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1


def test_an_unknown_layer_is_refused_by_name():
    model = small("test_resnet", (8, 96))
    with pytest.raises(UserError, match="no layer 'nowhere'"):
        grad_cams(model, torch.randn(1, 3, 32, 32), classifiers_of(model), np.array([[0], [1]]), "nowhere")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    model = small("test_resnet", (8, 96))
    with pytest.raises(UserError, match="pip install grad-cam"):
        grad_cams(model, torch.randn(1, 3, 32, 32), classifiers_of(model), np.array([[0], [1]]))
