"""The loss over a whole data set as a function of the weights: its value, gradient and Hessian products, at any offset.

Vectors are flat, fp64 and on the host, one entry per trainable parameter in the order of ``surface.parameters``: what scipy
wants, and a dtype in which sums over batches lose nothing. The model computes in its own dtype on its own device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from . import checks
from .batches import batch_loss, check_batches, first_dimension, moved_to, supervised
from .progress import Progress
from .untouched import BATCH_NORM, Untouched

_Placed = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Point:
    """The loss and its gradient at a point.

    Attributes:
        loss: L, the mean over the samples.
        gradient: ``[D]``, fp64, on the host.
    """

    loss: float
    gradient: Tensor


class LossSurface:
    """``L(x + v) = sum_b n_b loss_b(x + v) / sum_b n_b`` over all batches b of n_b samples, around a model's weights x.

    x are the weights as they are when a method is called. Each call goes through the data once, and leaves weights, buffers,
    ``.grad``, training flags and random number generators as they were, to the bit and in place, also if it ends by an
    exception or a KeyboardInterrupt. The default generators (torch's, Python's, NumPy's) are seeded for each pass: a shuffling
    loader yields the same batches in every one, and the surface is one fixed function.

    Args:
        model: its parameters with ``requires_grad`` are the weights; the others stay where they are. On one device or several.
        loss: ``loss(model(x), y) -> mean loss`` for batches ``(x, y)``, a 0-dim tensor; else a ``batch_loss``. Values are
            computed under ``no_grad``.
        batches: a DataLoader, or anything that can be iterated again and again. Tensors in tuples, lists and dicts are moved to
            the model's device where it has one. ``list(islice(loader, 10))`` measures on ten batches of it.
        count: how many samples a batch has, its weight; by default the first dimension of the first tensor in it.
        batch_norm: ``"eval"``: running statistics are used, and the cut into batches does not matter; ``"train"``: the
            statistics of each batch, in all modules that have running ones, which do not see it. Dropout is off in both.
        seed: of the default generators during a pass.
        progress: a bar, if tqdm is installed and stderr is a terminal.

    Attributes:
        parameters: the weights, D elements in all.
        dimension: D.
        samples: in one pass, ``sum_b n_b``; None before the first.
        passes: over the data, so far.

    Raises:
        TypeError: something that is no module, no function, nothing to iterate over, or weights that are not real.
        ValueError: no trainable parameter, a lazy one, a wrapper for parallel training, an iterator, which can be gone through
            but once, an unknown mode. Methods: no batch, another number of samples than in the pass before, a loss that is not
            a finite scalar.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> surface = LossSurface(model, torch.nn.functional.mse_loss, [(torch.randn(8, 2), torch.randn(8, 1))])
        >>> point = surface.gradient()
        >>> surface.loss(-0.1 * point.gradient) < point.loss
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batches: Iterable[Any],
        *,
        count: Callable[[Any], float] | None = None,
        batch_norm: str = "eval",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        named = _trainable(model)
        self._names = list(named)
        self.parameters = tuple(named.values())
        if not callable(loss):
            raise TypeError(
                f"loss: expected a function, got {type(loss).__name__}: pass torch.nn.functional.cross_entropy, say."
            )
        check_batches(batches)
        self.model = model
        self.dimension = sum(parameter.numel() for parameter in self.parameters)
        self.batch_norm = checks.one_of(batch_norm, "batch_norm", BATCH_NORM)
        self.samples: float | None = None
        self.passes = 0
        self._loss = loss if isinstance(loss, batch_loss) else supervised(loss)
        self._batches = batches
        self._count = count or first_dimension
        self._seed = checks.whole(seed, "seed", 0, "any number of your choice")
        self._progress = Progress(progress)

    def loss(self, offset: Tensor | None = None, *, finite: bool = True) -> float:
        """``L(x + offset)``. One forward pass over the data.

        Args:
            offset: ``[D]``; None: at the weights. The sum is rounded to the weights' dtype: in bfloat16 an offset of less than
                1/512 of a weight does not move it.
            finite: raise where the loss of a batch is not finite; False: the value is returned, inf or NaN.
        """
        return self.loss_with(self._moved(offset), finite=finite)

    @torch.inference_mode(False)
    def loss_with(self, values: _Placed, *, finite: bool = True) -> float:
        """The loss with each first tensor, one of the model's, holding the values of the second. One forward pass."""
        losses: list[tuple[float, float]] = []
        samples = self._sweep(values, lambda loss, n: losses.append((n, loss.item())), torch.no_grad(), finite)
        return sum(n * loss for n, loss in losses) / samples

    @torch.inference_mode(False)
    def gradient(self, offset: Tensor | None = None) -> Point:
        """``L(x + offset)`` and its gradient. One forward and backward pass; ``.grad`` is not touched."""
        losses: list[tuple[float, float]] = []
        total = self._zeros()

        def add(loss: Tensor, n: float) -> None:
            checks.no_graph(loss)
            losses.append((n, loss.item()))
            self._accumulate(total, torch.autograd.grad(loss, self.parameters, allow_unused=True), n)

        samples = self._sweep(self._moved(offset), add, torch.enable_grad())
        self._check_finite(total, "gradient")
        return Point(sum(n * loss for n, loss in losses) / samples, total.div_(samples))

    @torch.inference_mode(False)
    def hessian_product(self, vectors: Tensor, offset: Tensor | None = None) -> Tensor:
        """``H(x + offset) v``, by differentiating the gradient: one pass, whose backward runs once more per vector.

        What torch cannot differentiate twice fails with torch's own message. Attention is computed by its plain formula here,
        and compiled models run eagerly: their fast forms have no second derivative.

        Args:
            vectors: v, ``[D]``, or several, ``[m, D]``, which share the forward and the first backward pass.

        Returns:
            Tensor: of the shape of ``vectors``, fp64, on the host.
        """
        several = isinstance(vectors, Tensor) and vectors.dim() == 2
        rows = [checks.vector(row, "vectors", self.dimension) for row in (vectors if several else [vectors])]
        directions = [list(map(_like, self.pieces(row), self.parameters)) for row in rows]
        totals = [self._zeros() for _ in rows]

        def add(loss: Tensor, n: float) -> None:
            checks.no_graph(loss)
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            # The others are constant: a loss may be linear in a parameter.
            curved = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
            if not curved:
                return
            for number, (direction, total) in enumerate(zip(directions, totals, strict=True), start=1):
                products = torch.autograd.grad(
                    [gradients[i] for i in curved],
                    self.parameters,
                    [direction[i] for i in curved],
                    retain_graph=number < len(rows),
                    allow_unused=True,
                )
                self._accumulate(total, products, n)

        with ExitStack() as twice:
            twice.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import the compiler, two seconds
                twice.enter_context(torch.compiler.set_stance("force_eager"))
            samples = self._sweep(self._moved(offset), add, torch.enable_grad())
        for total in totals:
            self._check_finite(total, "Hessian product")
        return torch.stack(totals).div_(samples).reshape(vectors.shape)

    def stage(self, name: str, passes: int | None = None) -> AbstractContextManager[None]:
        """Names the bar of all passes inside; ``passes`` says how many there will be."""
        try:
            batches = len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        return self._progress.stage(name, None if passes is None or batches is None else passes * batches)

    def _sweep(
        self, placed: _Placed, each: Callable[[Tensor, float], None], grad: AbstractContextManager[Any], finite: bool = True
    ) -> float:
        """``each(loss, weight)`` for every batch, while the placed tensors hold their values; returns the weights' sum."""
        samples = 0.0
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        device = devices.pop() if len(devices) == 1 else None
        snapshot = Untouched(self.model, [tensor for tensor, _ in placed], self._batches, self.batch_norm, self._seed)
        try:
            snapshot.begin()
            for tensor, value in placed:
                tensor.data.copy_(value)
            with grad, self.stage("pass", 1):
                for number, batch in enumerate(self._batches):
                    batch = moved_to(batch, device)
                    weight = self._weight(batch, number)
                    each(checks.scalar(self._loss(self.model, batch), number, finite), weight)
                    samples += weight
                    self._progress.advance()
        finally:
            snapshot.put_back()
        self._check_pass(samples)
        return samples

    def _check_pass(self, samples: float) -> None:
        if samples == 0 and self.samples is None:
            raise ValueError("batches: expected at least one batch, got none: pass a loader that yields something.")
        if self.samples is not None and samples != self.samples:
            raise ValueError(
                f"batches: expected the {self.samples:g} samples of the first pass in each one, got {samples:g} in pass "
                f"{self.passes + 1}: pass a list of batches, or a loader that yields all of them every time."
            )
        self.samples = samples
        self.passes += 1

    def _check_finite(self, total: Tensor, what: str) -> None:
        if bool(torch.isfinite(total).all()):
            return
        name = next(
            name for name, piece in zip(self._names, self.pieces(total), strict=True) if not torch.isfinite(piece).all()
        )
        raise ValueError(
            f"loss: expected a finite {what}, got inf or NaN for {name!r} where the loss itself is finite: look for a square "
            "root or a norm at 0, or measure in a wider dtype."
        )

    def _weight(self, batch: Any, number: int) -> float:
        weight = float(self._count(batch))
        if not (isfinite(weight) and weight > 0):
            raise ValueError(
                f"count: expected a positive number of samples, got {weight:g} for batch {number}: leave out empty batches."
            )
        return weight

    def _moved(self, offset: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        if offset is None:
            return []
        pieces = self.pieces(checks.vector(offset, "offset", self.dimension))
        return [
            (parameter, (parameter.detach().cpu().double() + piece).to(parameter.dtype))
            for parameter, piece in zip(self.parameters, pieces, strict=True)
        ]

    def _zeros(self) -> Tensor:
        return torch.zeros(self.dimension, dtype=torch.float64, device="cpu")

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat ``[D]`` vector, one per parameter and in its shape. Writing into them writes into it."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def _accumulate(self, total: Tensor, gradients: Sequence[Tensor | None], weight: float) -> None:
        for piece, gradient in zip(self.pieces(total), gradients, strict=True):
            if gradient is not None:
                dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                piece.add_(dense.cpu().double(), alpha=weight)  # in this order: not every device has fp64


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


def _like(piece: Tensor, parameter: Tensor) -> Tensor:
    return piece.to(parameter.dtype).to(parameter.device)
