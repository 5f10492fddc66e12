"""The paper's metrics (Table 1 and the supplementary's): which frames, which numbers, and how sure they are."""

from __future__ import annotations

from dagan_rt.evaluation.extractors import Extractor, OnnxExtractor, load_extractors, read_descriptor
from dagan_rt.evaluation.pairs import read_pairs, write_pairs
from dagan_rt.evaluation.reenactments import BundleReenactment, RepeatSource, TorchReenactment
from dagan_rt.evaluation.runner import evaluate
from dagan_rt.evaluation.scores import METRICS, Evaluation, Score
from dagan_rt.evaluation.sets import ImageSet, SetList, sample_cross, sample_self, sample_sets

__all__ = [
    "METRICS", "BundleReenactment", "Evaluation", "Extractor", "ImageSet", "OnnxExtractor", "RepeatSource", "Score",
    "SetList", "TorchReenactment", "evaluate", "load_extractors", "read_descriptor", "read_pairs", "sample_cross",
    "sample_self", "sample_sets", "write_pairs",
]  # fmt: skip
