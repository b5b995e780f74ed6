"""Figures from rows: one function per figure of the paper."""

from mrl.figures.accuracy import accuracy_by_dim
from mrl.figures.style import save

__all__ = ["accuracy_by_dim", "save"]
