"""The optimizers."""

from .sam import SAM, Losses, perturbed

__all__ = ["SAM", "Losses", "perturbed"]
