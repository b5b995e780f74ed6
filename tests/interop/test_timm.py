import pytest
import timm
import torch

import mrl
from mrl import export
from mrl.errors import UserError
from mrl.interop.timm import export_backbone

VIT = {"img_size": 32, "patch_size": 8}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("backbone", "kwargs"), [("test_resnet", {}), ("test_vit", VIT), ("test_convnext", {})])
def test_timm_loads_the_file_and_embeds_the_same(backbone, kwargs, projection, make_saved_run, tmp_path):
    run = make_saved_run(backbone, backbone, kwargs=kwargs, projection=projection)
    line = export_backbone(run, tmp_path / "backbone.safetensors")
    theirs = eval(line, {"timm": timm}).eval()
    images = torch.randn(3, 3, 32, 32)
    model = mrl.load(run)
    with torch.no_grad():
        assert torch.allclose(theirs(images), model.embed(images), atol=1e-6)
        assert torch.allclose(mrl.unit_prefix(theirs(images), 16), model.encode(images, 16), atol=1e-6)


@pytest.mark.parametrize(("changes", "reason"), [({"blurpool": True}, "BlurPool"), ({"stem_stride": 2}, "stride 2")])
def test_fault_18_a_network_that_timm_would_load_as_another_one_is_refused(changes, reason, make_saved_run, tmp_path):
    run = make_saved_run("changed", **changes)
    with pytest.raises(UserError, match=f"has .*{reason}, which timm's test_resnet does not have"):
        export_backbone(run, tmp_path / "backbone.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_how_to_load_the_file_and_what_of_it_is_trained(ff_run, tmp_path, capsys):
    out = str(tmp_path / "b.safetensors")
    assert export.main(["timm", "--run", str(ff_run), "--out", out]) == 0
    printed = capsys.readouterr().out
    assert f"timm.create_model('test_resnet', num_classes=0, checkpoint_path='{out}')" in printed
    assert "first 32 numbers" in printed
    assert export.main(["timm", "--run", str(ff_run), "--out", str(tmp_path / "b.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
