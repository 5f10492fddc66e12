"""From a folder of raw videos of people talking to a training set: faces found, tracked, cropped, resized, split.

    prepare("raw", "data", Options())

The result, `data/`, in the layout of VoxCeleb as talking-head models use it:

    train/IDENTITY#VIDEO#START-END/0000000.png ...    a clip: frames of one face, one fixed square crop; or one .zip
    test/...                                          clips of other identities
    manifest.jsonl                                    one row a raw video: what came of it, or why nothing did
    prepare.json                                      the options, which a run that continues must repeat
    pairs-self.csv, pairs-cross.csv                   image sets of test/ for an evaluation
    contact.png                                       one frame of each of up to 40 clips

START and END are the first and the last frame's number in the raw video.
"""

from dagan_rt.preparation.options import Options
from dagan_rt.preparation.run import Outcome, prepare

__all__ = ["Options", "Outcome", "prepare"]
