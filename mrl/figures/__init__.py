"""Figures from rows: one function per figure of the paper."""

from mrl.figures.accuracy import accuracy_by_dim
from mrl.figures.retrieval import adaptive_retrieval, baselines_by_dim, interpolation, retrieval_by_dim
from mrl.figures.style import save

__all__ = [
    "accuracy_by_dim",
    "adaptive_retrieval",
    "baselines_by_dim",
    "interpolation",
    "retrieval_by_dim",
    "save",
]
