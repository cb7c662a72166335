"""Distillation terms: losses between a student's and a teacher's `SegmentationOutput`.

The only dependency is PyTorch. A term is a module called as ``term(student, teacher, target=None)``. It returns an
unweighted scalar, contains the parameters that it trains, and lists in ``needs`` which teacher outputs it reads.
`Criterion` weights and sums terms.
"""

from transkd.losses.at import ATLoss
from transkd.losses.cirkd import CIRKDMiniBatchLoss
from transkd.losses.cirkd_memory import CIRKDMemoryLoss
from transkd.losses.criterion import Criterion, CriterionOutput
from transkd.losses.cross_entropy import TaskCrossEntropy
from transkd.losses.csf import CSFLoss
from transkd.losses.cwd import CWDFeatureLoss, CWDLoss
from transkd.losses.dice import TaskDice
from transkd.losses.dist import DISTLoss
from transkd.losses.dkd import DKDLoss
from transkd.losses.ea import EALoss
from transkd.losses.fitnet import FitNetLoss
from transkd.losses.focal import TaskFocal
from transkd.losses.gl_mixer import GLMixerLoss
from transkd.losses.gradients import gradient_norm, gradient_statistics
from transkd.losses.ifvd import IFVDLoss
from transkd.losses.isrd import ISRDLoss
from transkd.losses.kd import KDLoss
from transkd.losses.manifold import ManifoldLoss
from transkd.losses.mgd import MGDLoss
from transkd.losses.ohem import TaskOHEM
from transkd.losses.pdd import PDDLoss
from transkd.losses.pea import PEALoss
from transkd.losses.reviewkd import ReviewKDLoss
from transkd.losses.schedule import Progress, Schedule
from transkd.losses.shared.distances import channel_kl, hierarchical_context, spatial_kl
from transkd.losses.skd import SKDPairwiseLoss
from transkd.losses.skd_adversarial import SKDAdversarialLoss
from transkd.losses.teacher_labels import TeacherLabelsLoss
from transkd.losses.vlfd import VLFDLoss
from transkd.losses.wecolora import WeCoLoRALoss

__all__ = [
    "ATLoss",
    "CIRKDMemoryLoss",
    "CIRKDMiniBatchLoss",
    "CSFLoss",
    "CWDFeatureLoss",
    "CWDLoss",
    "Criterion",
    "CriterionOutput",
    "DISTLoss",
    "DKDLoss",
    "EALoss",
    "FitNetLoss",
    "GLMixerLoss",
    "IFVDLoss",
    "ISRDLoss",
    "KDLoss",
    "MGDLoss",
    "ManifoldLoss",
    "PDDLoss",
    "PEALoss",
    "Progress",
    "ReviewKDLoss",
    "SKDAdversarialLoss",
    "SKDPairwiseLoss",
    "Schedule",
    "TaskCrossEntropy",
    "TaskDice",
    "TaskFocal",
    "TaskOHEM",
    "TeacherLabelsLoss",
    "VLFDLoss",
    "WeCoLoRALoss",
    "channel_kl",
    "gradient_norm",
    "gradient_statistics",
    "hierarchical_context",
    "spatial_kl",
]
