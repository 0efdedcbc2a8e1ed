"""The optimizers."""

from .micro_batch import MicroBatchSAM
from .sam import SAM, Losses, perturbed

__all__ = ["SAM", "Losses", "MicroBatchSAM", "perturbed"]
