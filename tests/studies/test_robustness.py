import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.transfer import robustness, synsets, trained_classes

SOURCE = Source("imagenet_a", "some_run", 3, 32, 28, False)
SHARED = Path(os.environ.get("MRL_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
IMAGENET = sorted(synsets("imagenet_v2"))


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet_c", "val", "objectnet", ""])
def test_fault_6_an_unknown_name_is_an_error_that_lists_the_known(name):
    with pytest.raises(UserError, match=r"imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, folder"):
        trained_classes(name, IMAGENET, IMAGENET)


@pytest.mark.parametrize(("name", "count"), [("imagenet_a", 200), ("imagenet_r", 200), ("imagenet_sketch", 1000)])
def test_named_sets_have_their_own_classes_among_those_of_imagenet(name, count):
    folders = sorted(synsets(name))
    trained = trained_classes(name, folders, IMAGENET)
    assert len(set(trained.tolist())) == count
    assert [IMAGENET[c] for c in trained] == folders


@pytest.mark.shared
@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_200_classes_agree_with_a_second_list(name):
    assert sorted(synsets(name)) == (SHARED / "imagenet-meta" / f"{name}_wnids.txt").read_text().split()


def test_a_named_set_with_other_folders_is_refused():
    with pytest.raises(UserError, match="imagenet_a has 200 class folders"):
        trained_classes("imagenet_a", sorted(synsets("imagenet_r")), IMAGENET)
    with pytest.raises(UserError, match="imagenet_r has 200 class folders"):
        trained_classes("imagenet_r", IMAGENET, IMAGENET)
    with pytest.raises(UserError, match="no classes of the model"):
        trained_classes("imagenet_a", sorted(synsets("imagenet_a")), ["cat", "dog"])


def test_folders_of_imagenet_v2_may_be_numbers_which_are_not_sorted_as_text():
    folders = sorted(str(c) for c in range(1000))
    assert folders[2] == "10"
    trained = trained_classes("imagenet_v2", folders, IMAGENET)
    assert [IMAGENET[c] for c in trained] == [synsets("imagenet_v2")[int(folder)] for folder in folders]


def test_any_other_folder_may_hold_some_classes_or_rename_them():
    classes = ["ape", "bee", "cat", "dog"]
    assert trained_classes("folder", ["cat", "ape"], classes).tolist() == [2, 0]
    assert trained_classes("folder", ["chat", "bee"], classes, {"chat": "cat"}).tolist() == [2, 1]
    with pytest.raises(UserError, match=r"1 of 2 class folders.*chat"):
        trained_classes("folder", ["chat", "bee"], classes)
    with pytest.raises(UserError, match="different classes"):
        trained_classes("folder", ["chat", "cat"], classes, {"chat": "cat"})
    with pytest.raises(UserError, match="different classes"):
        trained_classes("folder", [], classes)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_restricted_before_the_argmax(tied):
    head = NestedLinear([4, 8], 20, tied)
    classifiers = [head.weight_and_bias(g) for g in range(2)]
    rng = np.random.default_rng(0)
    vectors, labels = rng.standard_normal((90, 8)).astype(np.float32), rng.integers(7, size=90)
    trained = np.array([19, 3, 4, 11, 0, 8, 7])
    rows = robustness(vectors, labels, classifiers, trained, SOURCE, "MRL")
    with torch.no_grad():
        logits = head(torch.from_numpy(vectors)).numpy()
    for g, dim in enumerate((4, 8)):
        right = 0
        for of_image, label in zip(logits[g], labels, strict=True):
            right += max(trained, key=lambda c: of_image[c]) == trained[label]
        [row] = [row for row in rows if (row.metric, row.dim) == ("top_1", dim)]
        assert row.value == right / 90
    assert {(row.study, row.dataset, row.n) for row in rows} == {("robustness", "imagenet_a", 90)}


def test_all_classes_in_another_order_are_plain_classification():
    head = NestedLinear([8], 6)
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    with torch.no_grad():
        predicted = head(torch.from_numpy(vectors))[0].argmax(1).numpy()
    order = np.array([3, 1, 0, 2, 5, 4])
    rows = robustness(vectors, np.argsort(order)[predicted], [head.weight_and_bias(0)], order, SOURCE, "FF")
    assert {row.value for row in rows} == {1}
