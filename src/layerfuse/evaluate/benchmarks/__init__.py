"""Benchmarks of the field: their files, their questions and how they score an answer.

A benchmark is one file and one import line here.
"""

from layerfuse.evaluate.benchmarks.base import BENCHMARKS, Benchmark, Box, Column, Item, Judged

__all__ = ["BENCHMARKS", "Benchmark", "Box", "Column", "Item", "Judged"]
