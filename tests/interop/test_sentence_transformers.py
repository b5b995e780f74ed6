import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mrl
from mrl import export
from mrl.errors import UserError

library = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

from mrl.interop import hub  # noqa: E402
from mrl.interop.sentence_transformers import export_sentence_transformer  # noqa: E402


@pytest.fixture(scope="module")
def folder(saved_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "st"
    export_sentence_transformer(saved_run, out)
    return out


@pytest.fixture(scope="module")
def expected(saved_run, images):
    model = mrl.load(saved_run)
    return {dim: model.encode(images, dim).numpy() for dim in model.head.nesting_list}


def load(folder, **settings):
    return library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **settings)


def test_truncated_and_normalized_by_the_library_the_vectors_are_those_of_encode(folder, expected, pictures, tmp_path):
    load(folder).save_pretrained(str(tmp_path / "again"))
    for place, dim in ((folder, 8), (folder, 96), (tmp_path / "again", 32)):
        model = load(place, truncate_dim=dim)
        vectors = model.encode(pictures.images, normalize_embeddings=True, batch_size=3)
        assert np.allclose(vectors, expected[dim], atol=1e-5)
        # Without normalize_embeddings they are raw prefixes, whose cosines are the same.
        raw = model.encode(pictures.images)
        assert np.allclose(model.similarity(raw, raw), expected[dim] @ expected[dim].T, atol=1e-5)


def test_a_folder_of_fixed_size_gives_unit_vectors(saved_run, ff_run, expected, pictures, tmp_path):
    export_sentence_transformer(ff_run, tmp_path / "ff32")  # whose trained size is below the backbone's
    vectors = load(tmp_path / "ff32").encode(pictures.images, normalize_embeddings=True)
    assert np.allclose(vectors, expected[32], atol=1e-5)
    export_sentence_transformer(saved_run, tmp_path / "st32", dim=32)
    for settings in ({}, {"truncate_dim": 32}):
        model = load(tmp_path / "st32", **settings)
        assert model.get_embedding_dimension() == 32
        assert np.allclose(model.encode(pictures.images), expected[32], atol=1e-5)
    with pytest.raises(UserError, match="97 dims"):
        export_sentence_transformer(saved_run, tmp_path / "st97", dim=97)


def test_paths_and_dicts_are_images_too_and_text_is_refused(folder, expected, pictures):
    model = load(folder, truncate_dim=8)
    for given in ([str(path) for path in pictures.paths], [{"image": image} for image in pictures.images]):
        assert np.allclose(model.encode(given, normalize_embeddings=True), expected[8], atol=1e-5)
    with pytest.raises(ValueError, match="text"):
        model.encode(["a photograph of a cat"])


def test_one_folder_can_be_for_the_hub_and_for_the_library(saved_run, expected, pictures, tmp_path, capsys):
    both = hub.export_folder(saved_run, tmp_path / "both", "mit")
    assert export.main(["sentence_transformers", "--run", str(saved_run), "--out", str(both)]) == 0
    assert f'SentenceTransformer("{both}", trust_remote_code=True)' in capsys.readouterr().out
    vectors = load(both, truncate_dim=8).encode(pictures.images, normalize_embeddings=True)
    assert np.allclose(vectors, expected[8], atol=1e-5)
    assert mrl.load(both).width == 96
    assert {path.name for path in both.iterdir()} == set(hub.UPLOADED)


def info_nce(a, b, scale):
    """Each of ``a`` picks its partner in ``b`` by cosine."""
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    return F.cross_entropy(scale * cosines, torch.arange(len(a)))


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_matryoshka_loss_and_its_gradients_equal_the_library_s(weights, folder, images):
    dims = [8, 32, 96]
    model = load(folder).eval()
    network = model[0].model
    left, right = images[:3], images[3:6]
    wrapped = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = losses.MatryoshkaLoss(model, wrapped, dims, weights)([{"images": left}, {"images": right}], None)
    ours = mrl.MatryoshkaLoss(info_nce, dims, weights)(network.embed(left), network.embed(right), scale=20.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    last = network.backbone.get_submodule("layer4.0.conv2").weight
    of_ours, of_theirs = (torch.autograd.grad(loss, last)[0] for loss in (ours, theirs))
    assert of_ours.abs().max() > 0
    assert torch.allclose(of_ours, of_theirs, rtol=1e-3, atol=1e-6)
