import pytest
import timm
import torch

import mrl
from mrl import export
from mrl.errors import UserError
from mrl.interop.timm import export_backbone

VIT = {"img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(("backbone", "kwargs"), [("test_resnet", {}), ("test_vit", VIT), ("test_convnext", {})])
def test_timm_loads_the_file_and_embeds_the_same(backbone, kwargs, make_saved_run, tmp_path):
    run = make_saved_run(backbone, backbone, kwargs=kwargs)
    line = export_backbone(run, tmp_path / "backbone.safetensors")
    theirs = eval(line, {"timm": timm}).eval()
    images = torch.randn(3, 3, 32, 32)
    model = mrl.load(run)
    with torch.no_grad():
        assert torch.allclose(theirs(images), model.embed(images), atol=1e-6)
        assert torch.allclose(mrl.unit_prefix(theirs(images), 16), model.encode(images, 16), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"blurpool": True}, "has BlurPool, which timm's test_resnet has not"), ({"stem_stride": 2}, "stem of stride 2")],
)
def test_a_network_that_is_not_timm_s_is_refused_though_its_keys_would_fit(changes, reason, make_saved_run, tmp_path):
    run = make_saved_run("changed", **changes)
    with pytest.raises(UserError, match=reason):
        export_backbone(run, tmp_path / "backbone.safetensors")
    assert not list(tmp_path.iterdir())
    plain = timm.create_model("test_resnet", num_classes=0)
    model = mrl.load(run)
    plain.load_state_dict(model.backbone.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(plain.eval()(images), model.embed(images), atol=1e-3)


def test_the_command_prints_the_line_that_loads_the_file(saved_run, tmp_path, capsys):
    assert export.main(["timm", "--run", str(saved_run), "--out", str(tmp_path / "b.safetensors")]) == 0
    assert f"timm.create_model('test_resnet', num_classes=0, checkpoint_path='{tmp_path}" in capsys.readouterr().out
    assert export.main(["timm", "--run", str(saved_run), "--out", str(tmp_path / "b.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
