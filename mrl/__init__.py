"""Matryoshka Representation Learning for vision: one embedding, every prefix of it an embedding too."""

from mrl.errors import UserError
from mrl.interop import load
from mrl.matryoshka import MatryoshkaLoss, NestedLinear, nested_cross_entropy, prefix, unit_prefix
from mrl.model import MatryoshkaClassifier
from mrl.retrieval.rerank import funnel_search, rerank
from mrl.retrieval.search import exact_search
from mrl.studies.adaptive_classification import fit_thresholds, route

__version__ = "0.1.0"
__all__ = [
    "MatryoshkaClassifier",
    "MatryoshkaLoss",
    "NestedLinear",
    "UserError",
    "exact_search",
    "fit_thresholds",
    "funnel_search",
    "load",
    "nested_cross_entropy",
    "prefix",
    "rerank",
    "route",
    "unit_prefix",
]
