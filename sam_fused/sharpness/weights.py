"""The weights of a model as one flat vector, ``[D]``, fp64, on the host: what is measured, moved and summed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy


class Weights:
    """The trainable parameters of a model, in the order of ``model.parameters()``; a tied one counts once.

    Attributes:
        names: by which the model calls them.
        parameters: the parameters themselves.
        dimension: D, their elements.

    Raises:
        TypeError: no module, or weights that are not real.
        ValueError: a wrapper for parallel training, no trainable parameter, or a lazy one.
    """

    def __init__(self, model: nn.Module) -> None:
        found = _trainable(model)
        self._model = model
        self.names = list(found)
        self.parameters = tuple(found.values())
        self.dimension = sum(parameter.numel() for parameter in self.parameters)

    @property
    def dtypes(self) -> str:
        """Their dtypes by name, as ``"float32"``."""
        return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters}))

    def check_kept(self) -> None:
        """A parameter that the model no longer uses would have a gradient of zero, and every sharpness would be 0.

        Raises:
            ValueError: one was replaced or frozen since.
        """
        own = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if id(parameter) not in own:
                raise ValueError(
                    f"model: expected the parameters that it had when the surface was made, got another tensor for {name!r}, "
                    "as load_state_dict(assign=True) leaves it: make a new LossSurface."
                )
            if not parameter.requires_grad:
                raise ValueError(
                    f"model: expected the parameters to require gradients as when the surface was made, got {name!r} frozen: "
                    "make a new LossSurface."
                )

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector, one per parameter and in its shape."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def like(self, flat: Tensor) -> list[Tensor]:
        """The pieces in the parameters' dtypes and on their devices."""
        pairs = zip(self.pieces(flat), self.parameters, strict=True)
        return [piece.to(parameter.dtype).to(parameter.device) for piece, parameter in pairs]

    def moved(self, offset: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each parameter, and what it is at ``x + offset``: the sum in fp64, rounded to its dtype."""
        pairs = zip(self.parameters, self.pieces(offset), strict=True)
        return [(parameter, _sum(parameter.detach(), piece).to(parameter.dtype)) for parameter, piece in pairs]

    def zeros(self) -> Tensor:
        return torch.zeros(self.dimension, dtype=torch.float64, device="cpu")

    def accumulate(self, total: Tensor, gradients: Sequence[Tensor | None], weight: float) -> bool:
        """``total += weight * gradients``; whether there were any."""
        for piece, gradient in zip(self.pieces(total), gradients, strict=True):
            if gradient is not None:
                dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                piece.add_(dense.cpu().double(), alpha=weight)  # in this order: not every device has fp64
        return any(gradient is not None for gradient in gradients)

    def check_finite(self, total: Tensor, what: str) -> None:
        if bool(torch.isfinite(total).all()):
            return
        pairs = zip(self.names, self.pieces(total), strict=True)
        name = next(name for name, piece in pairs if not torch.isfinite(piece).all())
        raise ValueError(
            f"loss: expected a finite {what}, got inf or NaN for {name!r} where the loss itself is finite: look for a square "
            "root or a norm at 0, or measure in a wider dtype."
        )


def _sum(weights: Tensor, piece: Tensor) -> Tensor:
    """On the weights' device, so that they need not come to the host; Apple's has no fp64."""
    device = torch.device("cpu") if weights.device.type == "mps" else weights.device
    return weights.to(device).double() + piece.to(device)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}: pass the model itself.")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"model: expected the module itself, got a {type(model).__name__}, whose gradients cannot be differentiated: pass "
            "model.module."
        )
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(
            "model: expected at least one trainable parameter, got none: set requires_grad on what is to be measured."
        )
    for name, parameter in found:
        if is_lazy(parameter):
            raise ValueError(f"model: expected parameters with a shape, got the lazy {name!r}: run one batch through it first.")
        if not parameter.is_floating_point():
            raise TypeError(
                f"model: expected real floating-point parameters, got {parameter.dtype} for {name!r}: set its requires_grad to "
                "False, or hold real and imaginary parts."
            )
    return dict(found)
