from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from mrl.data.folder import ImageList
from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.retrieval.embeddings import EmbeddingMetadata, EmbeddingSet
from mrl.studies.run import EmbeddedRun
from mrl.studies.transfer import (
    LabelledFolder,
    TransferImages,
    few_shot,
    places_of,
    read_folder,
    synsets,
    transfer_studies,
)

CPU = torch.device("cpu")
METADATA = EmbeddingMetadata("0123", "pets", "val", 32, 28, "mean 0, std 1", False, "4567")
CLASSES = ("ape", "bee", "cat", "dog", "eel")


def folder_of(name, classes, labels=(), kind="folder"):
    listed = ImageList([], torch.tensor(labels, dtype=torch.int64), list(classes), 0)
    return LabelledFolder(name, kind, Path("/data") / name, listed)


def embeddings(labels, seed):
    """Four classes that can be told apart, in 8 dims."""
    rng = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(9).standard_normal((4, 8))
    labels = np.asarray(labels, dtype=np.int64)
    vectors = centers[labels] + rng.standard_normal((len(labels), 8))
    return EmbeddingSet(vectors.astype(np.float32), labels, METADATA)


def run_with(dims=(4, 8), **further):
    train, val = embeddings(np.arange(60) % 4, 1), embeddings(np.arange(20) % 4, 2)
    found = {f"images_{name}": images for name, images in further.items()}
    torch.manual_seed(0)
    return EmbeddedRun(
        Source("pets", "a_run", 3, 32, 28, False), NestedLinear(dims, 5), CLASSES, train, val, None, found
    )


def values(rows, study):
    return {(row.method, row.metric, row.dim): row.value for row in rows if row.study == study}


def test_robustness_is_the_head_on_the_classes_of_the_set_alone():
    images = embeddings(np.arange(30) % 3, 5)
    sets = TransferImages(robustness=[folder_of("sketches", ["cat", "ape", "hund"])], renaming={"hund": "dog"})
    run = run_with(sketches=images)
    rows = transfer_studies(run, sets, CPU)
    with torch.no_grad():
        logits = run.head(torch.from_numpy(images.vectors))
    for of_size, dim in zip(logits, (4, 8), strict=True):
        right = of_size[:, [2, 0, 3]].argmax(1).numpy() == images.labels
        assert values(rows, "robustness")["MRL", "top_1", dim] == pytest.approx(right.mean())
    assert {(row.dataset, row.run, row.seed, row.n) for row in rows} == {("sketches", "a_run", 3, 30)}


def test_few_shot_takes_the_shots_that_leave_images_and_says_so():
    images = embeddings(np.repeat([0, 1, 2], [9, 6, 8]), 5)
    run = run_with(birds=images)
    with pytest.warns(UserWarning, match="birds: the smallest class has 6 images, so few-shot with 7, 9 is left out"):
        rows = transfer_studies(run, TransferImages(few_shot=[folder_of("birds", "abc")]), CPU)
    alone = few_shot(images.vectors, images.labels, (4, 8), run.source, "MRL", shots=(1, 3, 5))
    assert values(rows, "few_shot") == values(alone, "few_shot")


def test_a_fixed_feature_run_is_also_cut_to_smaller_sizes():
    rows = transfer_studies(
        run_with((8,), birds=embeddings(np.arange(44) % 4, 5)),
        TransferImages(few_shot=[folder_of("birds", "abcd")]),
        CPU,
    )
    assert {(row.method, row.dim) for row in rows} == {("FF", 8), ("FF truncated", 8)}


def nearest(queries, labels, database, database_labels, dim):
    right = 0
    for query, label in zip(queries[:, :dim], labels, strict=True):
        cosines = database[:, :dim] @ query / np.linalg.norm(database[:, :dim], axis=1)
        right += database_labels[np.argmax(cosines)] == label
    return right / len(queries)


def test_queries_of_renamed_classes_are_looked_for_in_the_training_images():
    queries = embeddings(np.arange(10) % 2, 5)  # of "drei" and "bee"
    sets = TransferImages(retrieval=[[folder_of("v2", ["drei", "bee"])]], renaming={"drei": "dog"})
    run = run_with(v2=queries)
    rows = transfer_studies(run, sets, CPU)
    trained = np.array([3, 1])[queries.labels]
    for dim in (4, 8):
        expected = nearest(queries.vectors, trained, run.train.vectors, run.train.labels, dim)
        assert values(rows, "retrieval")["MRL", "top_1", dim] == pytest.approx(expected)
    assert {row.dataset for row in rows} == {"v2"}
    assert {row.study for row in rows} == {"retrieval", "adaptive_retrieval"}


def test_a_database_of_other_classes_needs_no_class_of_the_run():
    queries, database = embeddings(np.arange(10) % 2, 5), embeddings(np.arange(40) % 3, 6)
    sets = TransferImages(retrieval=[[folder_of("q", ["new", "old"]), folder_of("db", ["blue", "new", "old"])]])
    rows = transfer_studies(run_with(q=queries, db=database), sets, CPU)
    labels = queries.labels + 1  # "new" is class 1 of the database
    for dim in (4, 8):
        expected = nearest(queries.vectors, labels, database.vectors, database.labels, dim)
        assert values(rows, "retrieval")["MRL", "top_1", dim] == pytest.approx(expected)


def test_queries_of_a_class_that_the_database_lacks_are_refused():
    with pytest.raises(UserError, match=r"1 of 2 classes of /data/q \(red\) are not in /data/db"):
        places_of(folder_of("q", ["new", "red"]), folder_of("db", ["new", "old"]))


def test_what_does_not_fit_a_run_is_refused_before_anything_is_embedded():
    birds = folder_of("birds", ["gull"], [0, 0])
    for sets in (TransferImages(robustness=[birds]), TransferImages(retrieval=[[birds]])):
        with pytest.raises(UserError, match="gull"):
            sets.check("digits", CLASSES, None)
    TransferImages(few_shot=[birds]).check("digits", CLASSES, Path("/data/pets/train"))
    with pytest.raises(UserError, match="the run was trained on these"):
        TransferImages(few_shot=[birds]).check("digits", CLASSES, Path("/data/birds"))
    with pytest.raises(UserError, match="gull"):
        TransferImages(retrieval=[[birds, folder_of("db", ["tern"])]]).check("digits", CLASSES, None)


def test_one_name_for_two_folders_is_refused_and_one_folder_in_two_studies_is_not():
    one = folder_of("birds", "ab")
    other = LabelledFolder("birds", "folder", Path("/elsewhere/birds"), one.listed)
    assert list(TransferImages(robustness=[one], few_shot=[one]).folders()) == ["images_birds"]
    with pytest.raises(UserError, match="both called 'birds'"):
        TransferImages(robustness=[one], few_shot=[other]).folders()
    with pytest.raises(UserError, match="give each once"):
        TransferImages(retrieval=[[one], [one, one]]).folders()


def fill(folder, classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(folder / name / "1.png"))
    return folder


def test_a_folder_is_called_by_its_own_name_unless_that_says_nothing(tmp_path):
    for where, name in {"flowers": "flowers", "birds/val": "birds_val", "4k/queries": "4k_queries"}.items():
        found = read_folder("--few_shot", str(fill(tmp_path / where, ["b", "a"])))
        assert (found.name, found.kind, found.listed.classes) == (name, "folder", ["a", "b"])
    named = read_folder("--robustness", f"imagenet_v2={tmp_path / 'flowers'}")
    assert (named.name, named.kind, named.place) == ("imagenet_v2", "imagenet_v2", "images_imagenet_v2")
    assert read_folder("--few_shot", f"folder={tmp_path / 'flowers'}").name == "flowers"


def test_fault_6_an_unknown_set_or_folder_is_refused(tmp_path):
    fill(tmp_path / "flowers", ["a"])
    with pytest.raises(UserError, match=r"no data set is called 'imagenet-a'; allowed: DIR, imagenet_v2=DIR"):
        read_folder("--robustness", f"imagenet-a={tmp_path / 'flowers'}")
    with pytest.raises(UserError, match="is not a folder"):
        read_folder("--robustness", f"imagenet_a={tmp_path / 'none'}")
    with pytest.raises(UserError, match="is not a folder"):
        read_folder("--robustness", "imagenet_a=")
    with pytest.raises(UserError, match="holds no class folders"):
        read_folder("--few_shot", str(tmp_path / "flowers" / "a"))


def test_imagenet_a_must_hold_its_200_classes():
    wnids = sorted(synsets("imagenet_v2"))
    right = folder_of("imagenet_a", sorted(synsets("imagenet_a")), kind="imagenet_a")
    TransferImages(robustness=[right]).check("digits", wnids, None)
    with pytest.raises(UserError, match="imagenet_a has 200 class folders"):
        TransferImages(robustness=[folder_of("imagenet_a", wnids[:200], kind="imagenet_a")]).check(
            "digits", wnids, None
        )


def test_a_class_of_one_image_is_refused_before_anything_is_embedded():
    birds = folder_of("birds", "ab", [0, 1, 1])
    with pytest.raises(UserError, match="class 'a' has one image"):
        TransferImages(few_shot=[birds]).check("digits", CLASSES, None)


def test_a_folder_called_as_the_data_of_the_run_is_refused():
    for sets in (
        TransferImages(few_shot=[folder_of("pets", "ab")]),
        TransferImages(retrieval=[[folder_of("pets", "ab")]]),
    ):
        with pytest.raises(UserError, match="is called 'pets', as the data of the run are"):
            sets.check("pets", CLASSES, None)
