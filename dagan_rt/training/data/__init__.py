"""Pairs (or triples) of frames of one clip: from folders of clips, or from synthetic heads whose truth is known.

A sample is a pure function of (seed, epoch, index), and a batch of (seed, step): a run that stops and resumes sees
what it would have seen, and the ranks of a distributed run see together what one process would.
"""

from dagan_rt.training.data.folders import ClipFolder
from dagan_rt.training.data.heads import HeadsData, disparity_of, shrink
from dagan_rt.training.data.loader import Failures, Loader
from dagan_rt.training.data.protocol import BadClip, Clips, Frame
from dagan_rt.training.data.readers import IMAGE_ENDINGS, LARGEST_SIDE, PACKED_ENDING, VIDEO_ENDINGS
from dagan_rt.training.data.sampling import Augmentation, sample, sample_triple

__all__ = [
    "Augmentation", "BadClip", "ClipFolder", "Clips", "Failures", "Frame", "HeadsData", "IMAGE_ENDINGS", "LARGEST_SIDE",
    "Loader", "PACKED_ENDING", "VIDEO_ENDINGS", "disparity_of", "sample", "sample_triple", "shrink",
]  # fmt: skip
