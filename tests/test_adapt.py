import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from mrl import adapt
from mrl.errors import UserError
from mrl.retrieval.embeddings import EmbeddingMetadata

DIMS = (2, 4, 8)


@pytest.fixture(scope="module")
def sets():
    """Vectors of eight classes and labels; every coordinate mixes the classes with more noise in other directions."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    labels = rng.integers(8, size=600)
    latent = rng.standard_normal((600, 24)) * np.repeat([0.3, 2.0, 0.1], 8)
    latent[:, :8] += 1.2 * np.eye(8)[labels]
    vectors = ((latent + 0.5) @ turn).astype(np.float32)
    return vectors[:450], labels[:450], vectors[450:], labels[450:]


@pytest.fixture(scope="module")
def maps(sets):
    train, labels, *_ = sets
    return {"labels": adapt.fit(train, labels, DIMS), "none": adapt.fit(train, dims=DIMS)}


def test_the_neighbor_loss_is_the_cross_entropy_of_softmax_cosines_over_the_other_vectors():
    rng = np.random.default_rng(0)
    whole, prefix = rng.standard_normal((5, 6)), rng.standard_normal((5, 3))

    def shares(vectors, i):
        cosines = [vectors[i] @ v / np.linalg.norm(vectors[i]) / np.linalg.norm(v) for v in vectors]
        weights = [0 if j == i else np.exp(cosine / adapt.TEMPERATURE) for j, cosine in enumerate(cosines)]
        return np.array(weights) / sum(weights)

    total = 0
    for i in range(5):
        target, found = shares(whole, i), shares(prefix, i)
        total -= sum(target[j] * np.log(found[j]) for j in range(5) if j != i) / 5
    target = adapt.similarities(torch.from_numpy(whole)).softmax(dim=1)
    assert adapt.neighbor_loss(torch.from_numpy(prefix), target=target).item() == pytest.approx(total)


def test_prefixes_keep_neighbors_that_pca_and_truncation_lose():
    pixels = load_digits().data[:600].astype(np.float32)
    train, held_out, dims = pixels[:450], pixels[450:], (8, 16, 32)
    mean = train.mean(axis=0)
    pca, svd = (adapt.principal_components(train, center) for center in (mean, 0 * mean))
    score = adapt.scorer(held_out, train)
    by_map = np.array(score(adapt.fit(train, dims=dims), dims))
    assert all(by_map > np.array(score(lambda given: (given - mean) @ pca, dims)) + 0.04), by_map
    assert by_map[0] > score(lambda given: given @ svd, dims)[0] + 0.03, "where the fit starts"
    assert all(by_map > np.array(score(lambda given: given, dims)) + 0.3)


def test_labels_bring_classes_to_the_front_where_pca_brings_noise(sets, maps):
    train, labels, held_out, truth = sets
    mean = train.mean(axis=0)
    components = adapt.principal_components(train, mean)
    score = adapt.scorer(held_out, train, truth, labels)
    by_map, by_pca = score(maps["labels"], DIMS), score(lambda given: (given - mean) @ components, DIMS)
    assert all(np.array(by_map[1:]) > np.array(by_pca[1:]) + 0.2), (by_map, by_pca)


@pytest.mark.parametrize("kind", ["labels", "none"])
def test_a_map_is_one_matrix_whatever_the_lengths_of_the_vectors(kind, sets, maps, tmp_path):
    train, mapping = sets[0], maps[kind]
    lengths = np.random.default_rng(0).uniform(0.1, 9, (450, 1)).astype(np.float32)
    mapped = mapping(train)
    np.testing.assert_allclose(mapping(torch.from_numpy(lengths * train)), mapped, atol=1e-5)
    np.testing.assert_allclose(mapping(torch.from_numpy(train).bfloat16()), mapped, atol=0.02)
    expected = train @ mapping.weight.T
    np.testing.assert_allclose(mapped, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    mapping.save(tmp_path / "map.safetensors")
    again = adapt.load(tmp_path / "map.safetensors")
    np.testing.assert_array_equal(again(train), mapped)
    assert again.dims == DIMS


def test_the_seed_decides_and_neither_the_random_state_nor_the_names_of_classes(sets, maps):
    train, labels, *_ = sets
    torch.manual_seed(5)
    before = torch.get_rng_state()
    names = np.array([f"class {label}" for label in labels])
    for kind, of_kind in (("labels", names), ("none", None)):
        np.testing.assert_array_equal(adapt.fit(train, of_kind, DIMS).weight, maps[kind].weight)
        assert not np.array_equal(adapt.fit(train, of_kind, DIMS, seed=1).weight, maps[kind].weight)
    assert torch.equal(torch.get_rng_state(), before)


def argv(folder, vectors, labels=None, *more):
    np.save(folder / "v.npy", vectors)
    given = ["--vectors", folder / "v.npy", "--out", folder / "map.safetensors", "--dims", 2, 4, 8, *more]
    if labels is not None:
        np.save(folder / "y.npy", labels)
        given += ["--labels", folder / "y.npy"]
    return [str(part) for part in given]


@pytest.mark.parametrize("kind", ["labels", "none"])
@pytest.mark.filterwarnings("error")
def test_the_command_reports_on_vectors_that_it_held_out(kind, sets, tmp_path, capsys):
    train, labels, *_ = sets
    labels = labels if kind == "labels" else None
    assert adapt.main(argv(tmp_path, train, labels)) == 0
    printed = capsys.readouterr().out
    assert "45 vectors that were held out, in a database of 405" in printed
    order = np.random.default_rng(0).permutation(450)
    held_out, rest = order[:45], np.sort(order[45:])
    mapping = adapt.load(tmp_path / "map.safetensors")
    again = adapt.fit(train[rest], None if labels is None else labels[rest], DIMS)
    np.testing.assert_array_equal(mapping.weight, again.weight)

    def nearest(queries, database, k):
        return np.argsort(-adapt.unit(queries) @ adapt.unit(database).T)[:, :k]

    found = {int(line.split()[0]): line.split()[-1] for line in printed.splitlines() if line.split()[0] in "248"}
    for dim in DIMS:
        if labels is not None:
            first = nearest(mapping(train[held_out])[:, :dim], mapping(train[rest])[:, :dim], 1)[:, 0]
            share = (labels[rest][first] == labels[held_out]).mean()
        else:
            few = nearest(mapping(train[held_out])[:, :dim], mapping(train[rest])[:, :dim], 10)
            whole = nearest(train[held_out], train[rest], 10)
            share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(few, whole, strict=True)])
        assert found[dim] == f"{100 * share:.1f}"


def test_vectors_that_are_nested_already_are_told(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((450, 24)) * 0.7 ** np.arange(24)
    vectors[:9, 2:] = 0
    for labels in (None, 2 * (vectors[:, 0] > 0) + (vectors[:, 1] > 0)):
        with pytest.warns(UserWarning, match="look nested already: their first 2 numbers score") as told:
            assert adapt.main(argv(tmp_path, vectors, labels)) == 0
        assert len(told) == 1, "of random choices, all-zero prefixes are not told"
    metadata = EmbeddingMetadata("", "", "", 8, 8, "", False, "", trained_dims=[4, 24])
    (tmp_path / "v.json").write_text(json.dumps(vars(metadata)))
    with pytest.warns(UserWarning, match=r"nested already, at \[4, 24\] dims"):
        assert adapt.main(argv(tmp_path, vectors[9:, ::-1])) == 0


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        (lambda v: np.where(np.arange(len(v))[:, None] == 7, np.nan, v), None, "vector 7 holds NaN or infinity"),
        (lambda v: v[:, :7], None, "dims [2, 4, 8] ask for 8, but the vectors have only 7"),
        (lambda v: v[0], None, "needed is a matrix"),
        (lambda v: v[:19], None, "N at least 20"),
        (lambda v: v.astype(str), None, "needed is a matrix"),
        (lambda v: v, np.zeros(449), "the labels are (449,); needed is one for each of the 450 vectors"),
        (lambda v: v, np.zeros(450), "all labels are 0.0"),
    ],
)
def test_vectors_and_labels_that_do_not_fit_are_refused(change, labels, message, sets, tmp_path, capsys):
    assert adapt.main(argv(tmp_path, change(sets[0]), labels)) == 2
    error = capsys.readouterr().err
    assert error.startswith("\nerror: ") and message in error
    assert not (tmp_path / "map.safetensors").exists()


def test_files_that_are_something_else_are_refused_and_kept(sets, maps, tmp_path, capsys):
    path = tmp_path / "map.safetensors"
    save_file({"weight": np.zeros((2, 2), np.float32)}, path)
    for wrong, message in ((path, "is not a map"), (tmp_path / "none", "cannot be read as a map")):
        with pytest.raises(UserError, match=message):
            adapt.load(wrong)
    path.write_text("Dear reader")
    assert adapt.main(argv(tmp_path, sets[0])) == 2
    assert path.read_text() == "Dear reader" and "cannot be read as a map" in capsys.readouterr().err
    path.unlink()
    np.savez(tmp_path / "some.npz", vectors=sets[0])
    for more, message in (
        (("--vectors", tmp_path / "none.npy"), "none.npy cannot be read as a .npy file"),
        (("--vectors", tmp_path / "some.npz"), "some.npz cannot be read as a .npy file"),
        (("--out", tmp_path / "map.npy"), "allowed: a .safetensors file"),
        (("--dims", 4, 2), "strictly ascending"),
        (("--seed", -1), "--seed is -1"),
        (("--device", "abacus"), "--device abacus cannot be used: Expected one of cpu, cuda"),
    ):
        assert adapt.main(argv(tmp_path, sets[0], None, *more)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"vectors \(N, 24\), but these are \(3, 8\)"):
        maps["none"](np.zeros((3, 8)))
