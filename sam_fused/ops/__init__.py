"""The operations of a SAM step on lists of tensors: arithmetic and no policy."""

from .functional import grad_norm, perturb_, restore_, restore_accumulate_, restore_adamw_, restore_sgd_

__all__ = ["grad_norm", "perturb_", "restore_", "restore_accumulate_", "restore_adamw_", "restore_sgd_"]
