import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.hierarchy import (
    build_hierarchy,
    default_superclasses,
    hierarchy,
    per_class,
    read_class_table,
    trend,
    within_superclasses,
)
from mrl.studies.transfer import synsets

SOURCE = Source("animals", "some_run", 3, 32, 28, False)
SHARED = Path(os.environ.get("MRL_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
CLASSES = ("cat", "dog", "oak", "rock", "rose")
TABLE = {"cat": "animal", "dog": "animal", "oak": "plant", "rose": "plant"}


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def test_worked_by_hand():
    superclasses = build_hierarchy(CLASSES, TABLE)
    assert superclasses.names == ("animal", "plant")
    assert superclasses.superclass_of.tolist() == [0, 0, 1, -1, 1]
    labels = np.array([0, 1, 2, 3])  # cat, dog, oak, rock
    predictions = np.array([[1, 1, 3, 3], [0, 2, 4, 0]])
    rows = hierarchy(predictions, labels, [8, 16], superclasses, SOURCE, "MRL")
    # 8 dims: cat as dog is an animal, dog right, oak as rock is no plant, rock right.
    # 16 dims: cat right, dog as oak, oak as rose is a plant, rock as cat.
    assert values(rows) == {
        ("superclass_top_1", 8): pytest.approx(2 / 3),
        ("superclass_top_1", 16): pytest.approx(2 / 3),
        ("superclass_top_1_with_reject", 8): 0.75,
        ("superclass_top_1_with_reject", 16): 0.5,
        ("superclass_top_1 in animal", 8): 1,
        ("superclass_top_1 in animal", 16): 0.5,
        ("superclass_top_1 in plant", 8): 0,
        ("superclass_top_1 in plant", 16): 1,
        ("top_1 in animal", 8): 0.5,
        ("top_1 in animal", 16): 0.5,
        ("top_1 in plant", 8): 0,
        ("top_1 in plant", 16): 0,
    }
    assert {(row.metric, row.n) for row in rows if row.dim == 8} == {
        ("superclass_top_1", 3),
        ("superclass_top_1_with_reject", 4),
        ("superclass_top_1 in animal", 2),
        ("superclass_top_1 in plant", 1),
        ("top_1 in animal", 2),
        ("top_1 in plant", 1),
    }


def test_fault_14_classes_outside_the_table_are_counted_apart_and_only_where_there_are_some():
    labels = np.array([0, 3, 3, 3])
    always_rock = np.array([[3, 3, 3, 3]])
    partial, whole = build_hierarchy(CLASSES, TABLE), build_hierarchy(CLASSES, TABLE | {"rock": "mineral"})
    found = values(hierarchy(always_rock, labels, [8], partial, SOURCE, "MRL"))
    # The reject class alone makes a model that knows no superclass look right.
    assert (found["superclass_top_1", 8], found["superclass_top_1_with_reject", 8]) == (0, 0.75)
    metrics = {row.metric for row in hierarchy(always_rock, labels, [8], whole, SOURCE, "MRL")}
    assert "superclass_top_1_with_reject" not in metrics


def test_equals_a_loop_over_images_and_is_never_below_class_accuracy():
    rng = np.random.default_rng(0)
    classes = [f"c{i}" for i in range(12)]
    table = {name: f"s{int(name[1:]) % 3}" for name in classes[:9]}
    labels, predictions = rng.integers(12, size=300), rng.integers(12, size=(2, 300))
    found = values(hierarchy(predictions, labels, [8, 16], build_hierarchy(classes, table), SOURCE, "MRL"))
    for g, dim in enumerate((8, 16)):
        pairs = [(table.get(classes[a]), table.get(classes[b])) for a, b in zip(labels, predictions[g], strict=True)]
        inside = [a == b for a, b in pairs if a is not None]
        assert found["superclass_top_1", dim] == pytest.approx(np.mean(inside))
        assert found["superclass_top_1_with_reject", dim] == pytest.approx(np.mean([a == b for a, b in pairs]))
        of_s1 = [a == b for a, b in zip(labels, predictions[g], strict=True) if table.get(classes[a]) == "s1"]
        assert found["top_1 in s1", dim] == pytest.approx(np.mean(of_s1))
        assert found["superclass_top_1 in s1", dim] >= found["top_1 in s1", dim]


def test_names_of_classes_and_superclasses_change_no_number():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(5, size=50), rng.integers(5, size=(1, 50))
    renamed = {"cat": "z", "dog": "z", "oak": "a", "rose": "a"}
    first, second = (
        values(hierarchy(predictions, labels, [8], build_hierarchy(CLASSES, table), SOURCE, "MRL"))
        for table in (TABLE, renamed)
    )
    assert first["superclass_top_1", 8] == second["superclass_top_1", 8]
    assert first["top_1 in animal", 8] == second["top_1 in z", 8]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 2, 2, 3], "monotone"),
        ([2, 2, 2], "monotone"),
        ([3, 2, 2], "falling"),
        ([1, 3, 3, 2], "rise then dip"),
        ([3, 1, 1, 1, 2], "dip then rise"),
        ([1, 3, 2, 4], "no clear trend"),
        ([5], "monotone"),
    ],
)
def test_trends(values, name):
    assert trend(values) == name


def test_per_class_rows_worked_by_hand_without_the_class_that_has_no_images():
    labels = np.array([0, 0, 1])
    predictions = np.array([[0, 1, 1], [0, 0, 0], [0, 0, 1]])
    rows = per_class(predictions, labels, [8, 16, 32], ["cat", "dog", "oak"], SOURCE, "MRL")
    found = values(rows)
    assert [found["top_1 of class cat", dim] for dim in (8, 16, 32)] == [0.5, 1, 1]
    assert [found["top_1 of class dog", dim] for dim in (8, 16, 32)] == [1, 0, 1]
    assert not any("oak" in metric for metric, _ in found)
    assert found["classes that are monotone", None] == found["classes that are dip then rise", None] == 0.5
    assert sum(value for (metric, _), value in found.items() if "that are" in metric) == 1
    assert {row.n for row in rows if "that are" in row.metric} == {2}
    assert not any("that are" in row.metric for row in per_class(predictions[:1], labels, [8], "abc", SOURCE, "FF"))


def test_per_class_equals_a_loop():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(7, size=200), rng.integers(7, size=(2, 200))
    found = values(per_class(predictions, labels, [8, 16], [str(c) for c in range(7)], SOURCE, "MRL"))
    for c in range(7):
        for g, dim in enumerate((8, 16)):
            right = [p == c for p, label in zip(predictions[g], labels, strict=True) if label == c]
            assert found[f"top_1 of class {c}", dim] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("class\tgroup\ncat\tanimal\n", "columns"),
        ("", "columns"),
        ("class\tsuperclass\ncat\n", "line 2.*'cat'"),
        ("class\tsuperclass\ncat\tanimal\ncat\tplant\n", "line 3.*'cat'"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, content, said):
    (tmp_path / "table.tsv").write_text(content)
    with pytest.raises(UserError, match=said):
        read_class_table(tmp_path / "table.tsv", "superclass")


def test_a_table_may_have_more_columns_and_empty_lines(tmp_path):
    (tmp_path / "table.tsv").write_text('id\tname\tsuperclass\nn1\ta "cat\tanimal\n\nn2\toak\tplant\n')
    assert read_class_table(tmp_path / "table.tsv", "superclass") == {"n1": "animal", "n2": "plant"}


def test_a_missing_table_and_one_of_other_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="none.tsv does not exist"):
        read_class_table(tmp_path / "none.tsv", "superclass")
    with pytest.raises(UserError, match="none of the 5 classes"):
        build_hierarchy(CLASSES, {"bus": "vehicle"})
    with pytest.raises(UserError, match="none of the 2 images"):
        labels = np.array([3, 3])
        hierarchy(labels[None], labels, [8], build_hierarchy(CLASSES, TABLE), SOURCE, "MRL")


@pytest.mark.shared
def test_the_table_of_tiny_imagenet_holds_all_its_classes():
    folder = SHARED / "tiny-imagenet-200"
    table = read_class_table(folder / "superclasses.tsv", "superclass")
    classes = (folder / "wnids.txt").read_text().split()
    superclasses = build_hierarchy(classes, table)
    assert (len(superclasses.names), superclasses.superclass_of.min()) == (20, 0)
    with (folder / "superclasses.tsv").open() as file:
        assert {line["wnid"]: line["superclass"] for line in csv.DictReader(file, delimiter="\t")} == table


def test_within_a_superclass_only_its_own_classes_compete():
    superclasses = build_hierarchy(CLASSES, TABLE)
    head = NestedLinear([4, 8], 5)
    classifiers = [head.weight_and_bias(g) for g in range(2)]
    rng = np.random.default_rng(0)
    vectors, labels = rng.standard_normal((80, 8)).astype(np.float32), rng.integers(5, size=80)
    rows = within_superclasses(vectors, labels, classifiers, superclasses, SOURCE, "MRL")
    with torch.no_grad():
        logits = head(torch.from_numpy(vectors)).numpy()
    for name, members in {"animal": [0, 1], "plant": [2, 4]}.items():
        for g, dim in enumerate((4, 8)):
            right = [
                max(members, key=lambda c: of_image[c]) == label
                for of_image, label in zip(logits[g], labels, strict=True)
                if label in members
            ]
            [row] = [row for row in rows if (row.metric, row.dim) == (f"top_1 within {name}", dim)]
            assert (row.study, row.value, row.n) == ("hierarchy", pytest.approx(np.mean(right)), len(right))


def test_a_superclass_of_one_class_or_without_images_has_nothing_to_tell_apart():
    head, labels = NestedLinear([8], 5), np.array([0, 1, 3])
    classifiers = [head.weight_and_bias(0)]
    table = build_hierarchy(CLASSES, TABLE | {"rock": "mineral"})
    rows = within_superclasses(np.ones((3, 8), np.float32), labels, classifiers, table, SOURCE, "FF")
    assert {row.metric for row in rows} == {"top_1 within animal"}


def test_imagenet_gets_the_papers_superclasses_and_no_other_data_do():
    wnids = sorted(synsets("imagenet_v2"))
    superclasses = build_hierarchy(wnids, default_superclasses(wnids))
    assert len(superclasses.names) == 30
    assert (superclasses.superclass_of >= 0).sum() == 467
    assert default_superclasses(wnids[1:]) is None
    assert default_superclasses(CLASSES) is None
