"""Self-supervised face depth: learnt from how faces move in clips, without any known depth (the paper's section 3.1).

A depth network and a pose network are trained together: each frame must look right when it is drawn from the frames
before and after it, through its depth and their motion.
"""

from dagan_rt.training.geometry.losses import depth_losses
from dagan_rt.training.geometry.pose import PoseNetwork

__all__ = ["PoseNetwork", "depth_losses"]
