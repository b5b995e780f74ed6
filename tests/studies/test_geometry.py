import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mrl.errors import UserError
from mrl.model import build_backbone, build_model
from mrl.results import Source
from mrl.studies.geometry import (
    Blocks,
    blocks,
    describe_blocks,
    describe_cosines,
    describe_heat,
    describe_maps,
    describe_neighbors,
    effective_rank,
    grad_cams,
    maps,
    positive_pairs,
    revised_images,
    shown_sizes,
    similarity,
    telling_queries,
    typical_queries,
)

SOURCE = Source("digits", "some_run", 3, 32, 28, False)


def values(rows):
    return {(row.metric, row.dim): row.value for row in rows}


def mean_cosine(vectors, pairs, dim):
    sums = 0.0
    for i, j in pairs:
        a, b = vectors[i, :dim], vectors[j, :dim]
        sums += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return sums / len(pairs)


def test_similarity_approaches_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 6)
    vectors = rng.standard_normal((5, 16))[labels] + rng.standard_normal((30, 16))
    everything = list(itertools.permutations(range(30), 2))
    positive = [(i, j) for i, j in everything if labels[i] == labels[j]]
    found = values(similarity(vectors, labels + 65_536, [4, 16], SOURCE, "MRL", num_pairs=100_000))
    for dim in (4, 16):
        # The standard error of 100,000 samples of a value within -1 to 1 is below 0.0032.
        assert found["cosine_positive", dim] == pytest.approx(mean_cosine(vectors, positive, dim), abs=0.01)
        assert found["cosine_random", dim] == pytest.approx(mean_cosine(vectors, everything, dim), abs=0.01)


def test_positive_pairs_are_two_images_of_one_class_each_other_equally_often():
    labels = np.array([3, 70_000, 3, 1, 70_000, 3, 2])
    pairs = positive_pairs(labels, 40_000, np.random.default_rng(0))
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    frequency = {tuple(kind): count / len(pairs) for kind, count in zip(kinds.tolist(), counts, strict=True)}
    # Five images share a class; those of class 3 have two partners, those of class 70,000 one.
    of_three = dict.fromkeys(itertools.permutations((0, 2, 5), 2), 1 / 10)
    assert frequency == pytest.approx(of_three | {(1, 4): 1 / 5, (4, 1): 1 / 5}, abs=0.02)


def test_identical_images_are_at_1_at_most_and_classes_of_one_image_have_no_positive_pairs():
    vectors = np.tile(np.random.default_rng(0).standard_normal(24), (9, 1))
    rows = similarity(vectors, np.arange(9), [8, 24], SOURCE, "FF", num_pairs=50)
    assert {(row.metric, row.dim, row.n) for row in rows} == {("cosine_random", 8, 50), ("cosine_random", 24, 50)}
    assert all(row.value == pytest.approx(1) for row in rows)


def test_effective_rank_counts_equal_directions_and_ignores_rotation_and_scale():
    rng = np.random.default_rng(0)
    orthonormal = np.linalg.qr(rng.normal(size=(50, 5)))[0]
    assert effective_rank(orthonormal) == pytest.approx(5)
    assert effective_rank(7 * orthonormal @ np.linalg.qr(rng.normal(size=(5, 5)))[0]) == pytest.approx(5)
    assert effective_rank(np.outer(rng.normal(size=50), [1, 2, 3])) == pytest.approx(1)
    assert effective_rank(np.zeros((50, 3))) == 0
    # Shares 3/4 and 1/4 of the variance: exp(-(3/4 log 3/4 + 1/4 log 1/4)).
    assert effective_rank(orthonormal[:, :2] * np.sqrt([3, 1])) == pytest.approx(4 / 3**0.75)


def test_blocks_hold_their_coordinates_variance_and_class_share():
    # Coordinates 1 and 2 are the class alone, 3 and 4 differ within each class alone.
    labels = np.array([0, 0, 1, 1])
    vectors = np.array([[0, 0, -1, 1], [0, 0, 1, -1], [6, 2, -1, 1], [6, 2, 1, -1]], dtype=np.float32)
    found = blocks(vectors, labels, [2, 4])
    assert found.variance.tolist() == pytest.approx([(9 + 1) / 2 / 3, 1 / 3])
    assert found.between.tolist() == pytest.approx([1, 0])
    assert found.prefix_rank[0] == pytest.approx(1)
    assert found.prefix_rank[1] == pytest.approx(np.exp(-(10 / 12 * np.log(10 / 12) + 2 / 12 * np.log(2 / 12))))
    without_variance = blocks(np.ones((4, 4)), np.zeros(4, dtype=np.int64), [2, 4])
    assert not np.concatenate(without_variance[1:]).any(), "zero, not NaN"


def test_sentences_on_blocks_and_neighbors_have_their_numbers():
    found = Blocks((8, 16, 64), np.array([5.0, 1.0, 0.5]), np.array([0.9, 0.6, 0.4]), np.array([3.0, 4.0, 7.0]))
    said = describe_blocks({"mine": found})
    for part in ("mine: ", "first 8 dims has 5.0 times", "90% of it", "(16 to 64 dims) 0.5 times, 40%", "rank 7.0"):
        assert part in said
    one_size = Blocks((64,), np.array([1.0]), np.array([0.5]), np.array([7.0]))
    assert "(0 to 64 dims) 1.0 times, 50%" in describe_blocks({"mine": one_size})
    neighbors = {8: (np.array([[0, 1], [0, 0]]), None), 32: (np.array([[0, 0], [0, 0]]), None)}
    said = describe_neighbors(neighbors, np.array([5, 6]), np.array([5, 6]))
    assert "the 2 nearest neighbors of 2 queries" in said and "25.0% at 8, 50.0% at 32 dims" in said


def test_a_map_keeps_far_groups_apart_and_is_the_same_twice():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 15)
    vectors = np.eye(2)[labels] * 5 + rng.normal(scale=0.1, size=(30, 2))
    first, second = (maps(vectors, [2])[2] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    distances = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(30)
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_sizes_for_a_figure():
    assert shown_sizes([8, 16, 32, 64, 128, 256, 512, 1024, 2048]) == [8, 32, 128, 2048]
    assert shown_sizes([8, 16, 32, 64]) == [8, 32, 64] and shown_sizes([8]) == [8]


def test_queries_that_gain_most_come_first_one_of_each_class():
    database_labels = np.array([0, 1])
    small = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    full = np.array([[0, 0], [0, 0], [1, 0], [0, 0]])
    # Right neighbors, small and full: query 0 0 -> 2, 1 1 -> 2, 2 (class 1) 0 -> 1, 3 0 -> 2.
    found = {8: (small, small), 32: (full, full)}
    labels = np.array([0, 0, 1, 0])
    assert telling_queries(found, labels, database_labels, 2).tolist() == [0, 2]
    assert telling_queries(found, labels, database_labels, 4).tolist() == [0, 2, 3, 1]


def test_typical_queries_are_close_to_the_mean_numbers_of_right_neighbors():
    found = {
        8: (np.array([[0, 0], [0, 1], [1, 1], [0, 0]]), None),
        32: (np.array([[0, 0], [0, 0], [0, 1], [0, 0]]), None),
    }
    labels = np.array([0, 0, 0, 1])
    # Right neighbors, small and full: 2 2, 1 2, 0 1, 0 0; the means are 0.75 and 1.25.
    assert typical_queries(found, labels, np.array([0, 1]), 4).tolist() == [1, 3, 2, 0]


def test_revised_images_change_and_are_those_of_most_confidence_one_of_each_class():
    classes = np.array([[0, 1, 1, 2, 0], [0, 0, 0, 1, 1]])
    confidence = np.array([[0.1] * 5, [0.99, 0.5, 0.9, 0.7, 0.6]])
    assert revised_images(classes, confidence, 3).tolist() == [2, 3, 4]
    assert revised_images(classes, confidence, 9).tolist() == [2, 3, 4, 1, 0]


def test_sentences_on_maps_cosines_and_heat_have_their_numbers():
    places = {8: np.array([[0.0, 0], [0, 1], [9, 0], [9, 1]]), 32: np.array([[0.0, 0], [9, 0], [0, 1], [9, 1]])}
    said = describe_maps(places, np.array([0, 0, 1, 1]), k=1)
    assert "1 nearest points" in said and "100% at 8, 0% at 32 dims; by chance 33%" in said
    said = describe_cosines({8: (np.array([0.9, 0.3]), np.array([0.5, 0.1])), 32: (np.array([0.9]), np.array([0.1]))})
    assert "75.0% at 8, 100.0% at 32 dims" in said
    steps = np.arange(9.0).reshape(3, 3)
    heat = np.stack([[np.zeros((3, 3)), 8 - steps], [steps, steps], [2 * steps, steps]])
    assert "those at 32 dims: -0.50 at 8, 1.00 at 16 dims." in describe_heat(heat, [8, 16, 32])


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(name, dims, kwargs=None, px=32):
    torch.manual_seed(0)
    model = build_model(build_backbone(name, "scratch", 4 if kwargs else 2, False, kwargs or {}), 5, dims)
    model.train()(torch.randn(8, 3, px, px))  # BatchNorms that saw data
    return model.eval()


def classifiers_of(model):
    return model.head.weights_and_biases()


def slow_cam(model, layer, image, g, target):
    """Grad-CAM by its definition, one image: channels weighed by their mean gradient, then a ReLU, up and to 0..1."""
    kept = {}
    hook = model.backbone.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.update(map=output))
    logit = model(image[None])[g, 0, target]
    hook.remove()
    [gradient] = torch.autograd.grad(logit, kept["map"])
    heat = (gradient.mean(dim=(2, 3), keepdim=True) * kept["map"]).sum(dim=1).relu().detach()
    heat = F.interpolate(heat[None], image.shape[1:], mode="bilinear")[0, 0]
    return ((heat - heat.min()) / (heat.max() - heat.min())).numpy()


def test_grad_cam_is_the_gradient_of_each_prefixs_own_classifier_at_the_last_stage_with_16_cells():
    model = small("test_resnet", (8, 32, 96))
    images, targets = torch.randn(2, 3, 32, 32), np.array([[0, 1], [2, 3], [4, 0]])
    heat = grad_cams(model, images, classifiers_of(model), targets)
    layer = "layer3"  # the very last stage has 2 x 2 cells
    assert heat.shape == (3, 2, 32, 32)
    for g, i in np.ndindex(3, 2):
        np.testing.assert_allclose(heat[g, i], slow_cam(model, layer, images[i], g, targets[g, i]), atol=1e-4)
    with pytest.raises(UserError, match="4 x 4 cells or more.* for images of 3 px"):
        grad_cams(model, torch.randn(2, 3, 3, 3), classifiers_of(model), targets)


def test_grad_cam_of_a_transformer_looks_at_a_block_whose_patches_count():
    model = small("vit_tiny_patch16_224", (8, 32), VIT)
    heat = grad_cams(model, torch.randn(1, 3, 32, 32), classifiers_of(model), np.array([[0], [1]]))
    assert heat.shape == (2, 1, 32, 32) and heat.min() == 0 and heat.max() == 1, "the last block's patches are unread"
