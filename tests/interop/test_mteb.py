import numpy as np
import pytest
import torch
from PIL import ImageOps

import mrl
from mrl.errors import UserError

mteb = pytest.importorskip("mteb", reason="needs mteb: pip install -r requirements-extras.txt")
from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from mrl.interop.mteb import MatryoshkaEncoder  # noqa: E402

IMAGES = {"type": "Any2AnyRetrieval", "category": "i2i", "modalities": ["image"]}
TEXTS = {"type": "Retrieval", "category": "t2t", "modalities": ["text"]}


def find_the_partner(queries, corpus, kind=IMAGES):
    """A task of mteb over things in memory: of query i, document i is relevant."""
    about = {"name": "FindThePartner", "description": "local", "eval_langs": ["eng-Latn"]}
    about |= {"main_score": "hit_rate_at_1", "dataset": {"path": "local", "revision": "1"}}
    parts = {
        part: Dataset.from_dict({"id": [f"{part}{i}" for i in range(len(items))], kind["modalities"][0]: items})
        for part, items in (("queries", queries), ("corpus", corpus))
    }
    relevant = {f"queries{i}": {f"corpus{i}": 1} for i in range(len(queries))}

    class FindThePartner(AbsTaskRetrieval):
        metadata = TaskMetadata(**about, **kind)

        def load_data(self, **_):
            self.dataset = {"default": {"test": parts | {"relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    return FindThePartner()


def test_mteb_scores_each_dim_as_we_do_and_keeps_their_results_apart(saved_run, pictures, tmp_path):
    model, cache = mrl.load(saved_run), mteb.ResultCache(tmp_path)
    images = [image.convert("RGB") for image in pictures.images]
    mirrored = [ImageOps.mirror(image) for image in images]
    queries, corpus = (torch.stack([model.preprocess(image) for image in some]) for some in (images, mirrored))
    for dim in (8, 96):
        found = mrl.exact_search(model.encode(queries, dim), model.encode(corpus, dim), 7, [dim])[dim][0]
        ranks = 1 + np.argmax(found == np.arange(7)[:, None], axis=1)
        assert 0 < np.mean(ranks == 1) < 1  # so that another order would be noticed
        encoder = MatryoshkaEncoder(saved_run, dim)
        result = mteb.evaluate(encoder, find_the_partner(images, mirrored), cache=cache, show_progress_bar=False)
        [scores] = result.task_results[0].scores["test"]
        assert scores["hit_rate_at_1"] == pytest.approx(np.mean(ranks == 1), abs=1e-4)
        assert scores["mrr_at_10"] == pytest.approx(np.mean(1 / ranks), abs=1e-4)


def test_the_vectors_are_those_of_encode_at_dim_or_the_largest_trained_size(saved_run, ff_run, pictures, images):
    batches = [{"image": pictures.images[:3]}, {"image": pictures.images[3:]}]
    for run, dim, length in ((ff_run, None, 32), (saved_run, 8, 8)):
        encoder = MatryoshkaEncoder(run, dim)
        assert torch.allclose(encoder.encode(batches), mrl.load(run).encode(images, length), atol=1e-6)
        assert encoder.mteb_model_meta.embed_dim == length
    with pytest.raises(UserError, match="97 dims"):
        MatryoshkaEncoder(saved_run, 97)


def test_mteb_refuses_tasks_of_text(saved_run):
    with pytest.raises(ValueError, match=r"local/small supports \['image'\], but none overlap"):
        mteb.evaluate(MatryoshkaEncoder(saved_run), find_the_partner(["a cat"], ["a dog"], TEXTS), cache=None)
