import numpy as np
import pytest
import torch

from mrl.errors import UserError
from mrl.matryoshka import NestedLinear
from mrl.studies.classification import logit_batches, predict


@pytest.fixture(params=[False, True], ids=["separate", "tied"])
def case(request):
    head = NestedLinear([4, 8, 12], 9, request.param)
    rng = np.random.default_rng(0)
    vectors, mirrored = rng.standard_normal((2, 101, 12)).astype(np.float32)
    return head, [head.weight_and_bias(g) for g in range(3)], vectors, mirrored


@pytest.mark.parametrize("batch_rows", [1, 7, 101, 4096])
def test_equals_the_head_and_flips_are_summed(case, batch_rows):
    head, classifiers, vectors, mirrored = case
    with torch.no_grad():
        one = head(torch.from_numpy(vectors))
        both = one + head(torch.from_numpy(mirrored))
    torch.testing.assert_close(torch.cat(list(logit_batches(vectors, classifiers, batch_rows=batch_rows)), 1), one)
    batches = list(logit_batches(vectors, classifiers, mirrored, batch_rows=batch_rows))
    torch.testing.assert_close(torch.cat(batches, 1), both)
    found = predict(vectors, classifiers, mirrored, batch_rows=batch_rows)
    np.testing.assert_array_equal(found.classes, both.argmax(2))
    np.testing.assert_allclose(found.confidence, both.softmax(2).max(2).values, rtol=1e-5)


def test_the_sum_of_two_equal_views_is_surer_than_one(case):
    _, classifiers, vectors, _ = case
    one, both = predict(vectors, classifiers), predict(vectors, classifiers, vectors.copy())
    np.testing.assert_array_equal(one.classes, both.classes)
    assert (both.confidence > one.confidence).all()


def test_among_equal_logits_the_lower_class_wins_and_certainty_is_at_most_1():
    equal = predict(np.ones((2, 4), np.float32), [(torch.zeros(3, 4), torch.zeros(3))])
    assert equal.classes.tolist() == [[0, 0]]
    np.testing.assert_allclose(equal.confidence, 1 / 3)
    sure = predict(np.ones((1, 4), np.float32), [(torch.eye(3, 4) * 1e4, torch.tensor([0.0, 1e4, 0.0]))])
    assert sure.confidence.tolist() == [[1.0]]


def test_refuses_what_has_no_prediction(case):
    _, classifiers, vectors, mirrored = case
    with pytest.raises(UserError, match="mirrored"):
        predict(vectors, classifiers, mirrored[:50])
    with pytest.raises(UserError, match="no embeddings"):
        predict(vectors[:0], classifiers)
    vectors[70, 3] = np.nan
    with pytest.raises(UserError, match="image 70"):
        predict(vectors, classifiers, batch_rows=32)
