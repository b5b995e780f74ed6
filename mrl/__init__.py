"""Matryoshka Representation Learning for vision: one embedding, every prefix of it an embedding too."""

from mrl.errors import UserError
from mrl.heads import NestedLinear
from mrl.interop import load
from mrl.losses import MatryoshkaLoss, nested_cross_entropy
from mrl.models import MatryoshkaClassifier
from mrl.nesting import prefix, unit_prefix
from mrl.retrieval.rerank import funnel_search, rerank
from mrl.retrieval.search import exact_search
from mrl.studies.thresholds import fit_thresholds, route

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
