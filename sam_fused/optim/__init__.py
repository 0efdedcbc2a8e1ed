"""The optimizers."""

from .closures import Losses
from .micro_batch import MicroBatchSAM
from .sam import SAM

__all__ = ["SAM", "Losses", "MicroBatchSAM"]
