import inspect
import subprocess
import sys

import transkd.losses

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "hydra",
    "omegaconf",
    "timm",
    "wandb",
    "albumentations",
    "torchmetrics",
)


def test_public_names():
    assert set(transkd.losses.__all__) == {
        "CIRKDMiniBatchLoss",
        "CIRKDMemoryLoss",
        "IFVDLoss",
        "SKDPairwiseLoss",
        "SKDAdversarialLoss",
        "VLFDLoss",
        "ManifoldLoss",
        "WeCoLoRALoss",
        "ATLoss",
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
        "ISRDLoss",
        "KDLoss",
        "MGDLoss",
        "PDDLoss",
        "PEALoss",
        "Progress",
        "ReviewKDLoss",
        "Schedule",
        "TaskCrossEntropy",
        "TaskDice",
        "TaskFocal",
        "TaskOHEM",
        "TeacherLabelsLoss",
        "channel_kl",
        "gradient_norm",
        "gradient_statistics",
        "hierarchical_context",
        "spatial_kl",
    }
    for name in transkd.losses.__all__:
        documented = getattr(transkd.losses, name)
        assert inspect.getdoc(documented), name


def test_importing_needs_torch_alone():
    code = f"import sys, transkd.losses; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
