"""Sharpness-Aware Minimization for PyTorch that costs the gradients and little else."""

from .batch_norm import freeze_batch_norm_stats
from .frameworks import micro_batch, perturbed
from .functions import Perturbation, perturb, restore
from .graphs import GraphedStep, graphed_step
from .losses import bisam_ascent_loss
from .norm_layers import norm_parameters
from .ops.metrics import PerturbationMetrics
from .optim import SAM, Losses, MicroBatchSAM
from .schedule import RhoScheduler, SwitchSchedule

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "GraphedStep",
    "Losses",
    "MicroBatchSAM",
    "Perturbation",
    "PerturbationMetrics",
    "RhoScheduler",
    "SwitchSchedule",
    "__version__",
    "bisam_ascent_loss",
    "freeze_batch_norm_stats",
    "graphed_step",
    "micro_batch",
    "norm_parameters",
    "perturb",
    "perturbed",
    "restore",
]
