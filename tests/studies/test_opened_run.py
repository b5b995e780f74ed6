import json
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation  # not `eval`, which is Python's own
import train as training
from mrl.errors import UserError
from mrl.studies.classification import predict
from mrl.studies.opened_run import open_run

VIT = '{"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}'
TINY = [
    *("--config", "digits_mrl.yaml", "--model.backbone", "vit_tiny_patch16_224", "--train.epochs", "1"),
    *("--data.train_px", "16", "--data.eval_resize_px", "18", "--data.eval_px", "16", "--data.batch_size", "256"),
    *("--optim.warmup_epochs", "0.5", "--model.kwargs"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, dims in (("mrl", "[8, 32]"), ("ff", "[32]")):
        words = [*TINY, VIT, "--head.nesting_list", dims, "--run.name", name, "--run.dir", str(folder)]
        assert training.main(words) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "run_studies", lambda *arguments: [])
        assert evaluation.main(["--runs", str(folder / "mrl"), str(folder / "ff")]) == 0
    return folder


def test_embeddings_images_and_classifiers_of_a_run_belong_together(finished):
    run = open_run(finished / "mrl")
    assert str(run) == (
        "mrl: MRL of vit_tiny_patch16_224 on digits, sizes 8, 32; 1,442 training and 355 validation images "
        "of 10 classes"
    )
    rows = np.array([3, 350, 7])
    images = run.images("val", rows)
    with torch.no_grad():
        np.testing.assert_allclose(run.model.embed(images), run.val.vectors[rows], atol=1e-4)
        expected = run.model(images).argmax(dim=2)
    np.testing.assert_array_equal(predict(run.val.vectors[rows], run.classifiers).classes, expected)
    pictures = run.pictures("val", rows)
    assert pictures.shape == (3, 16, 16, 3) and pictures.min() >= 0 and pictures.max() <= 1
    mean, std = torch.tensor(run.config.data.mean), torch.tensor(run.config.data.std)
    again = ((torch.from_numpy(pictures) - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)


def test_a_fixed_feature_run_is_looked_at_cut_to_its_halves(finished):
    run = open_run(finished / "ff")
    assert (run.dims, run.method) == ((8, 16, 32), "FF truncated")
    weight, bias = run.model.head.weight_and_bias(0)
    for dim, (of_size, of_bias) in zip(run.dims, run.classifiers, strict=True):
        assert torch.equal(of_size, weight[:, :dim]) and torch.equal(of_bias, bias)


def test_what_is_missing_is_named_with_what_to_run(finished, tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        open_run(tmp_path / "nowhere")
    copy = shutil.copytree(finished / "mrl", tmp_path / "copy")
    metadata = copy / "embeddings" / "val" / "metadata.json"
    of_other_model = json.loads(metadata.read_text()) | {"checkpoint_sha256": "0"}
    metadata.write_text(json.dumps(of_other_model))
    with pytest.raises(UserError, match=r"no embeddings of its val images .* run: python eval\.py --runs"):
        open_run(copy)
    shutil.rmtree(copy / "embeddings")
    with pytest.raises(UserError, match="its train and val images"):
        open_run(copy)
