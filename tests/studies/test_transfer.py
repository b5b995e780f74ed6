import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchcodec.encoders import PngEncoder

from mrl.data.folder import ImageList, LeftOut
from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.transfer import (
    LabeledFolder,
    TransferImages,
    few_shot,
    read_folder,
    support_splits,
    synsets,
    transfer_studies,
)

CPU = torch.device("cpu")
SOURCE = Source("pets", "a_run", 3, 32, 28, False)
CLASSES = ("ape", "bee", "cat", "dog", "eel")
IMAGENET = sorted(synsets("imagenet_v2"))


def folder_of(name, classes, labels=(0, 0), kind="folder", parent="/data"):
    listed = ImageList([], torch.tensor(labels, dtype=torch.int64), list(classes), LeftOut())
    return LabeledFolder(name, kind, Path(parent) / name, listed)


def embeddings(labels, seed):
    """Four classes that can be told apart, in 8 dims."""
    rng = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(9).standard_normal((4, 8))
    labels = np.asarray(labels, dtype=np.int64)
    vectors = centers[labels] + rng.standard_normal((len(labels), 8))
    return SimpleNamespace(vectors=vectors.astype(np.float32), labels=labels)


def run_with(dims=(4, 8), tied=False, **images):
    """The part of an opened run that these studies read."""
    torch.manual_seed(0)
    return SimpleNamespace(
        source=SOURCE,
        head=NestedLinear(dims, 5, tied),
        trained_method="FF" if len(dims) == 1 else "MRL-E" if tied else "MRL",
        dims=dims,
        classes=CLASSES,
        train=embeddings(np.arange(60) % 4, 1),
        val=embeddings(np.arange(20) % 4, 2),
        transfer={f"images_{name}": found for name, found in images.items()},
    )


def values(rows, study):
    return {(row.method, row.metric, row.dim): row.value for row in rows if row.study == study}


@pytest.mark.parametrize("tied", [False, True])
def test_robustness_restricts_the_logits_to_the_classes_of_the_set_before_the_argmax(tied):
    images = embeddings(np.arange(30) % 3, 5)
    sets = TransferImages(robustness=[folder_of("sketches", ["cat", "ape", "hund"])], renaming={"hund": "dog"})
    run, trained = run_with(tied=tied, sketches=images), [2, 0, 3]
    rows = transfer_studies(run, sets, CPU)
    with torch.no_grad():
        logits = run.head(torch.from_numpy(images.vectors)).numpy()
    for of_size, dim in zip(logits, (4, 8), strict=True):
        right = [
            max(trained, key=lambda c: z[c]) == trained[label] for z, label in zip(of_size, images.labels, strict=True)
        ]
        assert values(rows, "robustness")["MRL-E" if tied else "MRL", "top_1", dim] == np.mean(right)
    assert {(row.dataset, row.run, row.seed, row.n) for row in rows} == {("sketches", "a_run", 3, 30)}


@pytest.mark.parametrize(("name", "count"), [("imagenet_a", 200), ("imagenet_r", 200), ("imagenet_sketch", 1000)])
def test_known_sets_have_their_own_classes_among_those_of_imagenet(name, count):
    folder = folder_of(name, sorted(synsets(name)), kind=name)
    trained = TransferImages().class_indices(folder, [], IMAGENET)
    assert len(set(trained.tolist())) == count
    assert [IMAGENET[c] for c in trained] == folder.listed.classes


def test_folders_of_imagenet_v2_may_be_numbers_which_are_not_sorted_as_text():
    folders = sorted(str(c) for c in range(1000))
    assert folders[2] == "10"
    trained = TransferImages().class_indices(folder_of("imagenet_v2", folders, kind="imagenet_v2"), [], IMAGENET)
    assert [IMAGENET[c] for c in trained] == [synsets("imagenet_v2")[int(folder)] for folder in folders]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"few_shot": [folder_of("birds", "ab", [0, 1, 1])]}, "the smallest with 1 images; give two or more classes"),
        ({"few_shot": [folder_of("pets", "ab", [0, 0, 1, 1])]}, "has the name of the run's data, 'pets'"),
        ({"few_shot": [folder_of("train", "ab", [0, 0, 1, 1])]}, "the run was trained on these images"),
        ({"robustness": [folder_of("train", CLASSES)]}, "/data/train: the run was trained on these images"),
        ({"retrieval": [[folder_of("train", CLASSES)]]}, "/data/train: the run was trained on these images"),
        ({"retrieval": [[folder_of("q", "ab")] * 2]}, "/data/q: each query would find itself"),
        ({"few_shot": [folder_of("a", "b"), folder_of("a", "b", parent="/x")]}, "/data/a and /x/a are both called 'a'"),
        ({"retrieval": [[folder_of("q", "ab"), folder_of("db", "b")]]}, r"1 of 2 .* /data/q \(a\).*of /data/db"),
        ({"retrieval": [[folder_of("q", "a")], [folder_of("q", "a")] * 2]}, "give each only once"),
        ({"retrieval": [[folder_of("q", ["chat", "bee"])]]}, r"1 of 2 classes of /data/q \(chat\) .*of the model"),
        ({"robustness": [folder_of("b", ["chat", "cat"])], "renaming": {"chat": "cat"}}, "two class folders of"),
        ({"robustness": [folder_of("a", IMAGENET, kind="imagenet_a")]}, "imagenet_a has 200 class folders"),
        ({"robustness": [folder_of("a", synsets("imagenet_a"), kind="imagenet_a")]}, "200 of 200 classes of /data/a"),
    ],
)
def test_what_does_not_fit_a_run_is_refused_before_anything_is_embedded(sets, message):
    with pytest.raises(UserError, match=message):
        TransferImages(**sets).check("pets", CLASSES, Path("/data/train"))


def fill(folder, classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        PngEncoder(torch.zeros(3, 8, 8, dtype=torch.uint8)).to_file(str(folder / name / "1.png"))
    return folder


def test_a_folder_is_called_by_its_own_name_unless_that_says_nothing(tmp_path):
    for where, name in {"flowers": "flowers", "birds/val": "birds_val", "4k/queries": "4k_queries"}.items():
        found = read_folder("--few_shot", str(fill(tmp_path / where, ["b", "a"])))
        assert (found.name, found.kind, found.listed.classes) == (name, "folder", ["a", "b"])
    named = read_folder("--robustness", f"imagenet_v2={tmp_path / 'flowers'}")
    assert (named.name, named.kind, named.place) == ("imagenet_v2", "imagenet_v2", "images_imagenet_v2")
    assert read_folder("--few_shot", f"folder={tmp_path / 'flowers'}").name == "flowers"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenet-a={}/flowers", "no dataset is called 'imagenet-a'; allowed: DIR, imagenet_v2=DIR"),
        ("={}/flowers", "no dataset is called ''"),
        ("imagenet_a={}/none", "is not a folder"),
        ("imagenet_a=", "is not a folder"),
        ("{}/flowers/a", "has no class folders"),
    ],
)
def test_fault_6_an_unknown_set_or_folder_is_refused(tmp_path, text, message):
    fill(tmp_path / "flowers", ["a"])
    with pytest.raises(UserError, match=message):
        read_folder("--robustness", text.format(tmp_path))


def nearest(queries, labels, database, database_labels, dim):
    cosines = queries[:, :dim] @ (database[:, :dim] / np.linalg.norm(database[:, :dim], axis=1, keepdims=True)).T
    return (database_labels[cosines.argmax(axis=1)] == labels).mean()


@pytest.mark.parametrize(
    ("folders", "renaming", "classes"),
    [
        ([folder_of("q", ["drei", "bee"])], {"drei": "dog"}, [3, 1]),  # among the training images of run_with
        ([folder_of("q", ["new", "old"]), folder_of("db", ["blue", "new", "old"])], {}, [1, 2]),
    ],
)
def test_queries_are_looked_for_in_the_training_images_or_in_a_database(folders, renaming, classes):
    run = run_with(q=embeddings(np.arange(10) % 2, 5), db=embeddings(np.arange(40) % 3, 6))
    sets = TransferImages(retrieval=[folders], renaming=renaming)
    rows = transfer_studies(run, sets, CPU)
    queries, database = run.transfer["images_q"], run.train if renaming else run.transfer["images_db"]
    for dim in (4, 8):
        labels = np.array(classes)[queries.labels]
        expected = nearest(queries.vectors, labels, database.vectors, database.labels, dim)
        assert values(rows, "retrieval")["MRL", "top_1", dim] == pytest.approx(expected)
    assert {row.dataset for row in rows} == {"q"} and {row.study for row in rows} == {"retrieval", "adaptive_retrieval"}
    assert {row.n for row in transfer_studies(run, sets, CPU, max_queries=6)} == {6}


def test_few_shot_of_a_fixed_feature_run_is_also_that_of_smaller_sizes():
    run = run_with((8,), birds=embeddings(np.arange(44) % 4, 5))
    rows = transfer_studies(run, TransferImages(few_shot=[folder_of("birds", "abcd")]), CPU)
    assert {(row.study, row.method, row.dim) for row in rows} == {
        ("few_shot", "FF", 8),
        ("few_shot", "FF truncated", 8),
    }


def test_few_shot_leaves_out_the_shots_that_leave_no_image_and_warns():
    images = embeddings(np.repeat([0, 1, 2], [9, 6, 8]), 5)
    arguments = (images.vectors, images.labels, (4, 8), SOURCE, "MRL")
    with pytest.warns(UserWarning, match="pets: the smallest class has 6 images, so few-shot with 7, 9 is left out"):
        rows = few_shot(*arguments)
    assert rows == few_shot(*arguments, shots=(1, 3, 5))


def test_splits_have_the_same_number_of_each_class_and_fewer_shots_are_among_the_more():
    index = np.repeat([0, 1, 2], [4, 6, 10])
    splits = list(support_splits(index, 3, 8))
    for supports, queries in splits:
        assert index[supports].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert sorted([*supports, *queries]) == list(range(20))
    assert len({tuple(supports) for supports, _ in splits}) > 1
    for (few, _), (many, _) in zip(support_splits(index, 1, 8), splits, strict=True):
        assert set(few) < set(many)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(60) % 4)
    vectors = rng.standard_normal((4, 8))[labels] + rng.standard_normal((60, 8))
    return (rng.uniform(0.5, 2, (60, 1)) * vectors).astype(np.float32), labels


def test_fault_19_few_shot_equals_a_loop_over_queries_that_cuts_and_then_normalizes(case):
    vectors, labels = case
    rows = few_shot(vectors, labels + 65_536, [2, 4, 8], SOURCE, "MRL", shots=[1, 3], num_splits=4)
    found = values(rows, "few_shot")
    for dim in (2, 4, 8):
        units = [v[:dim].astype(np.float64) / np.linalg.norm(v[:dim]) for v in vectors]
        for shots in (1, 3):
            accuracies = []
            for supports, queries in support_splits(labels, shots, 4):
                means = [np.mean([units[i] for i in supports if labels[i] == c], axis=0) for c in range(4)]
                right = 0
                for i in queries:
                    cosines = [units[i] @ mean / np.linalg.norm(mean) for mean in means]
                    right += np.argmax(cosines) == labels[i]
                accuracies.append(right / len(queries))
            assert found["MRL", f"top_1_{shots}_shot", dim] == pytest.approx(statistics.mean(accuracies))
            assert found["MRL", f"top_1_{shots}_shot_std", dim] == pytest.approx(statistics.stdev(accuracies))
    assert {(row.metric.removesuffix("_std"), row.n) for row in rows} == {("top_1_1_shot", 56), ("top_1_3_shot", 48)}
