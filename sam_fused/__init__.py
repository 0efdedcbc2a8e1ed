"""Sharpness-Aware Minimization for PyTorch that costs the gradients and little else."""

from .ops.metrics import PerturbationMetrics
from .optim import SAM, Losses, MicroBatchSAM, perturbed

__version__ = "0.1.0"

__all__ = ["SAM", "Losses", "MicroBatchSAM", "PerturbationMetrics", "__version__", "perturbed"]
