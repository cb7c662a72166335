"""Distillation terms: losses between a student's and a teacher's `SegmentationOutput`.

Needs torch alone. A term is a module called as ``term(student, teacher, target=None)``; it gives a scalar,
knows no weight, owns what it trains, and names in ``needs`` what it reads of the teacher. `Criterion` holds
and weighs terms.
"""

from transkd.losses.criteria import channel_kl, hierarchical_context, spatial_kl
from transkd.losses.criterion import Criterion, CriterionOutput
from transkd.losses.cross_entropy import TaskCrossEntropy
from transkd.losses.csf import CSFLoss
from transkd.losses.cwd import CWDLoss
from transkd.losses.ea import EALoss
from transkd.losses.gl_mixer import GLMixerLoss
from transkd.losses.gradients import gradient_norm, gradient_statistics
from transkd.losses.pea import PEALoss
from transkd.losses.schedule import Progress, Schedule

__all__ = [
    "CSFLoss",
    "CWDLoss",
    "Criterion",
    "CriterionOutput",
    "EALoss",
    "GLMixerLoss",
    "PEALoss",
    "Progress",
    "Schedule",
    "TaskCrossEntropy",
    "channel_kl",
    "gradient_norm",
    "gradient_statistics",
    "hierarchical_context",
    "spatial_kl",
]
