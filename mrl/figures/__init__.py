"""Figures from rows: one function per figure of the paper."""

from mrl.figures.accuracy import accuracy_by_dim
from mrl.figures.cascade import cascade_by_expected_dim, first_correct_histogram
from mrl.figures.hierarchy import (
    accuracy_within_superclasses,
    class_accuracy_against_full_width,
    superclass_accuracy_by_dim,
)
from mrl.figures.retrieval import adaptive_retrieval, baselines_by_dim, interpolation, retrieval_by_dim
from mrl.figures.style import save

__all__ = [
    "accuracy_by_dim",
    "accuracy_within_superclasses",
    "adaptive_retrieval",
    "baselines_by_dim",
    "cascade_by_expected_dim",
    "class_accuracy_against_full_width",
    "first_correct_histogram",
    "interpolation",
    "retrieval_by_dim",
    "save",
    "superclass_accuracy_by_dim",
]
