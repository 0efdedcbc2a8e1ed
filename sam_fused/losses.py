"""Losses of papers that perturb along another loss than they descend: for ``step(closure, ascent_closure=...)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .ops.dtypes import HALVES

_GAMMA = math.log(math.e - 1)


def _tanh(difference: Tensor, alpha: float) -> Tensor:
    return torch.tanh(alpha * difference)


def _log(difference: Tensor, alpha: float) -> Tensor:
    return 1 - softplus(_GAMMA - difference)


_PHI = {"tanh": _tanh, "log": _log}


def bisam_ascent_loss(logits: Tensor, targets: Tensor, *, mu: float = 1.0, phi: str = "tanh", alpha: float = 0.1) -> Tensor:
    r"""The loss that Bi-SAM [2407.12993] ascends, a smooth stand-in for the share of mistakes:

    .. math::
        \frac{1}{\mu} \log \sum_j \exp\big(\mu \, \varphi(f_j - f_y)\big)

    averaged over the samples; j runs over all classes, y among them. A sample is a mistake where some
    :math:`f_j - f_y` is above 0: :math:`\varphi` stands below that step of 0 and 1, the log-sum-exp for the largest over j.
    Bi-SAM descends the cross-entropy at the perturbed weights. Half-precision logits are computed with in fp32.

    Example:
        >>> import torch
        >>> from sam_fused import SAM
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> def closure_of(criterion):
        ...     def closure():
        ...         loss = criterion(model(x), y)
        ...         loss.backward()
        ...         return loss
        ...     return closure
        >>> loss = optimizer.step(closure_of(torch.nn.functional.cross_entropy), ascent_closure=closure_of(bisam_ascent_loss))

    Args:
        logits: ``[samples, classes]``, of any floating-point dtype.
        targets: ``[samples]``, int64, the class of each; there is no index that is ignored.
        mu: above 0; the larger, the closer the sum is to its largest term.
        phi: ``"tanh"``, :math:`\varphi(x) = \tanh(\alpha x)`; or ``"log"``, :math:`1 - \log(1 + e^{\gamma - x})` with
            :math:`\gamma = \log(e - 1)`, so that :math:`\varphi(0) = 0`.
        alpha: of ``"tanh"``, above 0.

    Raises:
        TypeError: targets that are no classes.
        ValueError: shapes that do not fit, an unknown phi, mu or alpha not above 0.
    """
    if phi not in _PHI:
        raise ValueError(f"phi: expected one of {', '.join(_PHI)}, got {phi!r}: use 'tanh'.")
    for name, value in (("mu", mu), ("alpha", alpha)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}: use the paper's default.")
    given: dict[str, Any] = {"logits": logits, "targets": targets}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}: pass what cross_entropy takes.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected classes, int64, got {targets.dtype}: pass indices, from 0 and none to ignore.")
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits: expected [samples, classes] and as many targets, got {tuple(logits.shape)} and {tuple(targets.shape)}: "
            "flatten other dimensions into the samples."
        )
    if logits.dtype in HALVES:
        logits = logits.float()
    differences = logits - logits.gather(1, targets[:, None])
    return (torch.logsumexp(mu * _PHI[phi](differences, alpha), dim=1) / mu).mean()
