from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.results import Source
from mrl.studies.hierarchy import (
    Hierarchy,
    build_hierarchy,
    class_groups,
    colors_of_images,
    confusion_counts,
    default_superclasses,
    describe_confusions,
    describe_knowledge,
    describe_needs,
    group_classes,
    hierarchy,
    knowledge,
    nearest_classes,
    per_class,
    read_class_table,
    sizes_from_two,
    sizes_needed,
    trend,
    within_superclasses,
)
from mrl.studies.transfer import synsets

SOURCE = Source("animals", "some_run", 3, 32, 28, False)
CLASSES = ("cat", "dog", "oak", "rock", "rose")
TABLE = {"cat": "animal", "dog": "animal", "oak": "plant", "rose": "plant"}


def values(rows):
    return {(row.metric, row.group, row.dim): row.value for row in rows}


def test_worked_by_hand():
    superclasses = build_hierarchy(CLASSES, TABLE)
    assert superclasses.names == ("animal", "plant")
    assert superclasses.superclass_of.tolist() == [0, 0, 1, -1, 1]
    labels = np.array([0, 1, 2, 3])  # cat, dog, oak, rock
    predictions = np.array([[1, 1, 3, 3], [0, 2, 4, 0]])
    rows = hierarchy(predictions, labels, [8, 16], superclasses, SOURCE, "MRL")
    # 8 dims: cat as dog is an animal, dog right, oak as rock is no plant, rock right.
    # 16 dims: cat right, dog as oak, oak as rose is a plant, rock as cat.
    expected = {
        ("superclass_top_1", None): (2 / 3, 2 / 3, 3),
        ("superclass_top_1_with_reject", None): (0.75, 0.5, 4),
        ("superclass_top_1", "animal"): (1, 0.5, 2),
        ("superclass_top_1", "plant"): (0, 1, 1),
        ("top_1", "animal"): (0.5, 0.5, 2),
        ("top_1", "plant"): (0, 0, 1),
    }
    assert [(row.metric, row.group, row.dim, row.value, row.n) for row in rows] == [
        (*kind, dim, pytest.approx(values[g]), values[2])
        for kind, values in expected.items()
        for g, dim in enumerate((8, 16))
    ]


def test_fault_14_classes_outside_the_table_are_counted_apart_and_only_where_there_are_some():
    labels, always_rock = np.array([0, 3, 3, 3]), np.array([[3, 3, 3, 3]])
    partial, whole = (build_hierarchy(CLASSES, table) for table in (TABLE, TABLE | {"rock": "mineral"}))
    found = values(hierarchy(always_rock, labels, [8], partial, SOURCE, "MRL"))
    # The reject class alone makes a model that knows no superclass look right.
    assert (found["superclass_top_1", None, 8], found["superclass_top_1_with_reject", None, 8]) == (0, 0.75)
    metrics = {row.metric for row in hierarchy(always_rock, labels, [8], whole, SOURCE, "MRL")}
    assert metrics == {"superclass_top_1", "top_1"}


def test_within_a_superclass_only_its_own_classes_compete_and_one_class_has_no_rows():
    superclasses = build_hierarchy(CLASSES, TABLE | {"rock": "mineral", "elm": "plant"})
    head = NestedLinear([4, 8], 5)
    classifiers = head.weights_and_biases()
    rng = np.random.default_rng(0)
    vectors, labels = rng.standard_normal((80, 8)).astype(np.float32), rng.integers(5, size=80)
    rows = within_superclasses(vectors, labels, classifiers, superclasses, SOURCE, "MRL")
    with torch.no_grad():
        logits = head(torch.from_numpy(vectors)).numpy()
    expected = {}
    for name, members in {"animal": [0, 1], "plant": [2, 4]}.items():
        for of_size, dim in zip(logits, (4, 8), strict=True):
            pairs = [(z, label) for z, label in zip(of_size, labels, strict=True) if label in members]
            right = [max(members, key=lambda c: z[c]) == label for z, label in pairs]
            expected["top_1_within", name, dim] = (pytest.approx(np.mean(right)), len(right))
    assert {(row.metric, row.group, row.dim): (row.value, row.n) for row in rows} == expected
    animals = labels < 2
    rows = within_superclasses(vectors[animals], labels[animals], classifiers, superclasses, SOURCE, "MRL")
    assert {row.group for row in rows} == {"animal"}, "plants have no images"


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
    assert [found["top_1", "cat", dim] for dim in (8, 16, 32)] == [0.5, 1, 1]
    assert [found["top_1", "dog", dim] for dim in (8, 16, 32)] == [1, 0, 1]
    assert {(row.group, row.n) for row in rows if row.dim == 8} == {("cat", 2), ("dog", 1)}
    shares = {row.group: row.value for row in rows if row.metric == "share_of_classes"}
    assert shares["monotone"] == shares["dip then rise"] == 0.5 and sum(shares.values()) == 1
    assert {(row.n, row.dim) for row in rows if row.metric == "share_of_classes"} == {(2, None)}
    assert {row.metric for row in per_class(predictions[:1], labels, [8], "abc", SOURCE, "FF")} == {"top_1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class\tgroup\ncat\tanimal\n", "needed are the class first and one called superclass"),
        ("superclass\ncat\n", "needed are the class first and one called superclass"),
        ("", "is not a tab-separated table"),
        ("class\tsuperclass\n", "lists no classes"),
        ("class\tsuperclass\ncat\t \n", "class 'cat' needs one superclass"),
        ("class\tsuperclass\ncat\tanimal\ncat\tplant\n", "class 'cat' needs one superclass"),
        (None, "does not exist"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "table.tsv").write_text(content)
    with pytest.raises(UserError, match=f"table.tsv.*{message}"):
        read_class_table(tmp_path / "table.tsv", "superclass")


def test_a_table_may_have_more_columns_quotes_repeats_empty_lines_and_classes_called_na(tmp_path):
    (tmp_path / "table.tsv").write_text(
        'id\tname\tsuperclass\nn1\ta "cat\tanimal\n\nNA\toak\tplant\n01\tx\tplant\nn1\t\tanimal\n'
    )
    assert read_class_table(tmp_path / "table.tsv", "superclass") == {"n1": "animal", "NA": "plant", "01": "plant"}


def test_names_in_a_table_match_folders_in_any_unicode_form(tmp_path):
    (tmp_path / "table.tsv").write_text("folder\ttrained_class\ncafe\u0301\tthe\u0301\n", encoding="utf-8")
    assert read_class_table(tmp_path / "table.tsv", "trained_class") == {"caf\u00e9": "th\u00e9"}


def test_imagenet_gets_the_papers_superclasses_and_no_other_data_do():
    wnids = sorted(synsets("imagenet_v2"))
    superclasses = build_hierarchy(wnids, default_superclasses(wnids))
    assert len(superclasses.names) == 30
    assert (superclasses.superclass_of >= 0).sum() == 467
    assert default_superclasses(wnids[1:]) is None and default_superclasses(CLASSES) is None
    with pytest.raises(UserError, match="none of the 5 classes"):
        build_hierarchy(CLASSES, default_superclasses(wnids))


def test_nearest_classes_at_untrained_sizes_are_those_of_a_slow_search():
    dims = sizes_from_two([6, 12])
    assert dims == [2, 4, 6, 12] and sizes_from_two([2, 4]) == [2, 4]
    rng = np.random.default_rng(0)
    queries, database = rng.normal(size=(20, 12)).astype(np.float32), rng.normal(size=(30, 12)).astype(np.float32)
    labels = rng.integers(0, 4, 30)
    for of_size, dim in zip(nearest_classes(queries, database, labels, dims), dims, strict=True):
        cosines = queries[:, :dim] @ (database[:, :dim] / np.linalg.norm(database[:, :dim], axis=1)[:, None]).T
        np.testing.assert_array_equal(of_size, labels[cosines.argmax(axis=1)])


def test_groups_are_balanced_whatever_lengths_are_and_classes_without_structure_are_said_to_have_none():
    rng = np.random.default_rng(0)
    labels, classes = np.repeat(np.arange(100), 5), [f"c{i}" for i in range(100)]
    families = rng.normal(size=(10, 64))[np.arange(100) % 10] + 0.6 * rng.normal(size=(100, 64))
    of_families = families[labels] + 0.2 * rng.normal(size=(500, 64))
    lengths = np.random.default_rng(1).uniform(1, 50, (500, 1))
    found = group_classes((lengths * of_families).astype(np.float32), labels, classes)
    assert found.note.startswith("10 groups of 10 classes") and "; structure (silhouette 0." in found.note
    assert found.names[0] == "c0, c10, c20, c30, c40 and 5 more"
    assert found.superclass_of.tolist() == list(range(10)) * 10
    at_random = rng.normal(size=(100, 64))[labels] + 0.2 * rng.normal(size=(500, 64))
    without = group_classes(np.abs(at_random).astype(np.float32), labels, classes)
    assert "no group structure" in without.note, without.note
    assert 2 <= np.bincount(without.superclass_of).min() <= np.bincount(without.superclass_of).max() <= 30
    two = group_classes(np.eye(2, dtype=np.float32), np.arange(2), ["a", "b"], 2)
    assert two.names == ("a", "b") and "no group structure" in two.note


def test_groups_names_and_colors_of_a_run(tmp_path):
    def run(*classes):
        train = SimpleNamespace(vectors=np.eye(len(classes), dtype=np.float32), labels=np.arange(len(classes)))
        return SimpleNamespace(classes=classes, val=SimpleNamespace(labels=np.array([2, 0, 1])), train=train)

    few, many, table = run("n1", "n2", "n3"), run(*(f"c{i}" for i in range(12))), tmp_path / "table.tsv"
    table.write_text("class\tname\tsuperclass\nn1\tcat\tanimal\nn2\tdog\tanimal\nn3\toak\tplant\n")
    groups, names = class_groups(few, str(table))
    assert (groups.names, names) == (("animal", "plant"), ["cat", "dog", "oak"])
    assert groups.note == "2 groups of 1 to 2 classes, from a table"
    table.write_text("class\tsuperclass\nn1\tanimal\n")
    assert class_groups(few, str(table))[1] == ["n1", "n2", "n3"]
    assert len(class_groups(few)[0].names) == 2
    of_images, colored = colors_of_images(few, np.array([0, 2]))
    assert of_images.tolist() == [2, 1] and colored == few.classes
    of_images, colored = colors_of_images(many, np.array([0, 2]))
    assert of_images.tolist() == class_groups(many)[0].superclass_of[[2, 1]].tolist() and colored[-1] == "other"


@pytest.mark.parametrize(
    ("inside", "n", "verdict"),
    [
        (0.8, 400, "more often than in random groups at 2, 8 dims"),
        (0.3, 400, "no more often than in random groups"),
        (0.8, 40, "Fewer than 30 of 40 images are wrong at every size"),
    ],
)
def test_what_groups_show_is_said_from_the_numbers(inside, n, verdict):
    values = {"top_1": 0.5, "superclass_top_1": 0.5 + inside / 2, "shuffled_superclass_top_1": 0.5 + 0.3 / 2}
    rows = [SOURCE.row("prefix_knowledge", "MRL", m, v, n, dim=dim) for m, v in values.items() for dim in (2, 8)]
    text = describe_knowledge([*rows, SOURCE.row("classification", "MRL", "top_1", 0.9, n, dim=8)])
    assert verdict in text
    assert text.splitlines()[2].split("%")[2].strip() == f"{100 * inside:.1f}"


@pytest.mark.parametrize(("inside", "more"), [(0.8, "more often"), (0.5, "no more often"), (0.2, "less often")])
def test_small_and_full_prefix_are_compared(inside, more):
    shares = {2: (0.4, inside), 8: (0.8, 0.5)}  # {dim: (class right, errors in their group)}
    rows = [SOURCE.row("classification", "MRL", "top_1", 0.9, 1000, dim=dim) for dim in shares]
    for dim, (right, share) in shares.items():
        of_groups = [right + (1 - right) * part for part in (share, 0.1)]
        metrics = ("top_1", "superclass_top_1", "shuffled_superclass_top_1")
        values = zip(metrics, (right, *of_groups), strict=True)
        rows += [SOURCE.row("prefix_knowledge", "MRL", metric, value, 1000, dim=dim) for metric, value in values]
    text = describe_knowledge(rows)
    assert "With 2 dims the class is right 50% as often as with 8" in text
    assert f"Errors stay in their group {more} than at 8 dims." in text


def test_knowledge_of_classes_groups_and_random_groups():
    groups = Hierarchy(np.array([0, 0, 1, 1]), ("ab", "cd"))
    labels = np.array([0, 1, 2, 3])
    predictions = np.array([[1, 0, 3, 2], [0, 1, 2, 2]])
    found = values(knowledge(predictions, labels, [2, 8], groups, SOURCE, "MRL", num_shuffles=3000))
    assert (found["top_1", None, 2], found["top_1", None, 8]) == (0, 0.75)
    assert (found["superclass_top_1", None, 2], found["superclass_top_1", None, 8]) == (1, 1)
    # Of two random pairs of four classes, a wrong class is the partner of the right one in a third of all cases.
    assert found["shuffled_superclass_top_1", None, 2] == pytest.approx(1 / 3, abs=0.03)
    assert found["shuffled_superclass_top_1", None, 8] == pytest.approx(0.75 + 0.25 / 3, abs=0.01)
    rows = knowledge(predictions, labels, [2, 8], Hierarchy(np.array([0, 0, -1, -1]), ("ab",)), SOURCE, "MRL")
    assert {row.n for row in rows} == {2}, "of classes c and d nothing is known"
    assert [row.value for row in rows] == [0, 1, 1, 1, 1, 1]


def test_confusions_are_counted_and_needed_sizes_hand_worked():
    labels = np.array([0, 0, 1, 1, 2])
    predictions = np.array([[1, 1, 1, 1, 2], [0, 1, 1, 1, 2], [0, 0, 1, 0, 2]])
    counts = confusion_counts(predictions, labels, 4)
    assert counts[1].tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert counts.sum(axis=(1, 2)).tolist() == [5, 5, 5]
    # Class 0 gets better up to 32, but 16 is within one of its two images; class 3 has no image.
    assert sizes_needed(counts, [8, 16, 32]).tolist() == [16, 8, 8, 0]
    assert sizes_needed(10 * counts, [8, 16, 32]).tolist() == [32, 8, 8, 0]
    # A dip on the way does not count as reached.
    assert sizes_needed(10 * counts[[2, 0, 2]], [8, 16, 32])[0] == 32
    # 80 of 100 right have a standard error of 4 images.
    right = np.array([75, 76, 80])
    of_100 = np.stack([np.stack([right, 100 - right], axis=1), np.zeros((3, 2), dtype=int)], axis=1)
    assert sizes_needed(of_100, [8, 16, 32]).tolist() == [16, 0]
    needs = describe_needs(counts, [8, 16, 32], list("abcd"))
    assert "Of 3 classes, 2 need 8, 1 need 16, 0 need 32 dims." in needs and "never predicts 2 of them: a, d." in needs


def test_frequent_confusions_are_listed_with_their_groups():
    counts = np.zeros((2, 4, 4), dtype=np.int64)
    counts[0] = [[9, 5, 0, 0], [0, 9, 3, 0], [0, 0, 9, 0], [0, 0, 4, 9]]
    counts[1, 0, 1] = 2
    groups = Hierarchy(np.array([0, 0, -1, -1]), ("ab",))
    text = describe_confusions(counts, [8, 32], list("abcd"), groups)
    rows = [line.split() for line in text.splitlines()[1:4]]
    assert rows == [
        ["a", "b", "5", "2", "the", "same"],
        ["d", "c", "4", "0", "another"],
        ["b", "c", "3", "0", "another"],
    ]
    assert "Of the 3 most frequent confusions at 8 dims, 1 are between classes of one group; of all pairs" in text
    assert "of classes, 17% are." in text, "one of six pairs: classes without a group are of none"
    assert describe_confusions(counts[::-1] * 0, [8, 32], list("abcd"), groups) == "Nothing is confused at 8 dims."
