"""The loss over a whole data set as a function of the weights: its value, gradient and Hessian products, at any offset.

Vectors are flat, fp64 and on the host, one entry per trainable parameter in the order of ``surface.parameters``: what scipy
wants, and a dtype in which sums over batches lose nothing. The model computes in its own dtype on its own device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checks, loaders
from .batches import batch_loss, check_batches, first_dimension, modules_of, moved_to, supervised
from .progress import Progress
from .untouched import BATCH_NORM, Untouched
from .weights import Weights

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

    x are the weights as they are when a method is called. Each call goes through the data once, and leaves parameters, buffers,
    ``.grad``, training flags and random number generators as they were, to the bit and in place, also if it ends by an
    exception or a KeyboardInterrupt. The generators (torch's default ones, Python's, NumPy's, a DataLoader's own) are seeded
    for each pass: a shuffling loader yields the same batches in every one, and the surface is one fixed function.

    Args:
        model: its parameters with ``requires_grad`` are the weights; the others stay where they are. On one device or several.
        loss: ``loss(model(x), y) -> mean loss`` for batches ``(x, y)``, a 0-dim tensor; else a ``batch_loss``. Values are
            computed under ``no_grad``. A loss that is a module is put into eval mode for the pass and put back as the model is.
        batches: a DataLoader, or anything that can be iterated again and again. Tensors in tuples, lists and dicts are moved to
            the parameters' device where they have one, and so is what has a ``to`` of its own. ``list(islice(loader, 10))``
            measures on ten batches of it.
        count: how many samples a batch has, its weight; by default the size of the first dimension, on which all tensors in it
            have to agree.
        batch_norm: ``"eval"``: running statistics are used, and the cut into batches does not matter where there are some;
            ``"train"``: the statistics of each batch, in all modules with buffers called ``running_*``, which do not see it.
            Dropout is off in both.
        seed: of the generators during a pass.
        progress: None: a bar, if tqdm is installed and stderr is a terminal, or in a notebook; True: in any case; False: none.

    Attributes:
        parameters: the weights, D elements in all.
        dimension: D.
        samples: in one pass, ``sum_b n_b``; None before the first.
        passes: over the data, so far.
        dtype: of the weights, as ``"float32"``.
        loss_dtype: of the loss; None before the first pass.

    Raises:
        TypeError: something that is no module, no function, nothing to iterate over, or weights that are not real.
        ValueError: no trainable parameter, a lazy one, a wrapper for parallel training, an iterator, which can be gone through
            but once, an unknown mode. Methods: no batch, one whose tensors do not agree on the number of samples, another
            number of samples than in the pass before, a loss that is not a finite scalar or does not depend on the parameters,
            another loss at the same weights within one measurement, a parameter that was replaced or frozen since.

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
        progress: bool | None = None,
    ) -> None:
        self._weights = Weights(model)
        self.parameters = self._weights.parameters
        self.dimension = self._weights.dimension
        self.dtype = self._weights.dtypes
        checks.function(loss, "loss", "torch.nn.functional.cross_entropy, say")
        check_batches(batches)
        if count is not None:
            checks.function(count, "count", "count=lambda batch: len(batch[0]), say")
        self.model = model
        self.batch_norm = checks.one_of(batch_norm, "batch_norm", BATCH_NORM)
        self.samples: float | None = None
        self.passes = 0
        self.loss_dtype: torch.dtype | None = None
        self._loss = loss if isinstance(loss, batch_loss) else supervised(loss)
        self._roots = [model, *modules_of(loss)]
        self._batches = batches
        self._count = count or first_dimension
        self._seed = checks.whole(seed, "seed", 0, "any number of your choice")
        self._progress = Progress(progress)
        self._at_weights: list[float] | None = None  # inside of a stage: the loss there, once it is known

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
        losses = _Mean()
        self._sweep(values, losses.add, torch.no_grad(), finite)
        return losses.value if values else self._same(losses.value)

    @torch.inference_mode(False)
    def gradient(self, offset: Tensor | None = None) -> Point:
        """``L(x + offset)`` and its gradient. One forward and backward pass; ``.grad`` is not touched."""
        losses, total, used = _Mean(), self._weights.zeros(), False

        def add(loss: Tensor, n: float) -> None:
            nonlocal used
            checks.no_graph(loss)
            losses.add(loss, n)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            used = self._weights.accumulate(total, gradients, n) or used

        samples = self._sweep(self._moved(offset), add, torch.enable_grad())
        checks.dependent(used)
        self._weights.check_finite(total, "gradient")
        return Point(losses.value if offset is not None else self._same(losses.value), total.div_(samples))

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
        directions = [self._weights.like(row) for row in rows]
        totals = [self._weights.zeros() for _ in rows]
        losses, used = _Mean(), False

        def add(loss: Tensor, n: float) -> None:
            nonlocal used
            checks.no_graph(loss)
            losses.add(loss, n)
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            used = used or any(gradient is not None for gradient in gradients)
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
                self._weights.accumulate(total, products, n)

        with ExitStack() as twice:
            twice.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import the compiler, two seconds
                twice.enter_context(torch.compiler.set_stance("force_eager"))
            samples = self._sweep(self._moved(offset), add, torch.enable_grad())
        checks.dependent(used)
        if offset is None:
            self._same(losses.value)
        for total in totals:
            self._weights.check_finite(total, "Hessian product")
        return torch.stack(totals).div_(samples).reshape(vectors.shape)

    @contextmanager
    def stage(self, name: str | None, passes: int | None = None) -> Iterator[None]:
        """Names the bar of all passes inside; ``passes`` says how many there will be, at most.

        The weights stay inside of it, and so has the loss there: passes that give different ones are of different functions.
        """
        try:
            batches = len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        outer, self._at_weights = self._at_weights, [] if self._at_weights is None else self._at_weights
        try:
            with self._progress.stage(name, None if passes is None or batches is None else passes * batches):
                yield
        finally:
            self._at_weights = outer

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat ``[D]`` vector, one per parameter and in its shape. Writing into them writes into it."""
        return self._weights.pieces(flat)

    def _sweep(
        self, placed: _Placed, each: Callable[[Tensor, float], Any], grad: AbstractContextManager[Any], finite: bool = True
    ) -> float:
        """``each(loss, weight)`` for every batch, while the placed tensors hold their values; returns the weights' sum."""
        self._weights.check_kept()
        loaders.check_idle(self._batches)
        samples, complete = 0.0, False
        devices = {parameter.device for parameter in self.model.parameters()}
        device = devices.pop() if len(devices) == 1 else None
        snapshot = Untouched(self._roots, [tensor for tensor, _ in placed], self._batches, self.batch_norm, self._seed)
        try:
            try:
                snapshot.begin()
                for tensor, value in placed:
                    tensor.data.copy_(value)
                torch.clear_autocast_cache()  # of the weights as they were
                with grad, self.stage(None, 1):
                    for number, batch in enumerate(self._batches):
                        batch = moved_to(batch, device)
                        weight = self._weight(batch, number)
                        loss = checks.scalar(self._loss(self.model, batch), number, finite)
                        checks.no_backward(self.parameters)
                        each(loss, weight)
                        samples, self.loss_dtype = samples + weight, loss.dtype
                        self._progress.advance()
                complete = True
            finally:
                snapshot.put_back()
        finally:
            snapshot.put_back()  # an interrupt may have come before the first was under way
            if not complete:
                loaders.stop_workers(self._batches)
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

    def _same(self, loss: float) -> float:
        """The loss at the weights, which has to be what it was there before in this measurement."""
        if self._at_weights is None or self.loss_dtype is None:
            return loss
        # With and without a graph kernels may differ, and some sum in an order of chance: by roundings, not by half the digits.
        if self._at_weights and abs(loss - self._at_weights[0]) > torch.finfo(self.loss_dtype).eps ** 0.5 * abs(loss):
            raise ValueError(
                f"batches: expected the same loss at the same weights, got {loss:g} in pass {self.passes} and "
                f"{self._at_weights[0]:g} in another one: pass list(batches), for the data have random numbers of their own."
            )
        self._at_weights.append(loss)
        return loss

    def _weight(self, batch: Any, number: int) -> float:
        weight = float(self._count(batch))
        if not (isfinite(weight) and weight > 0):
            raise ValueError(
                f"count: expected a positive number of samples, got {weight:g} for batch {number}: leave out empty batches."
            )
        return weight

    def _moved(self, offset: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        return [] if offset is None else self._weights.moved(checks.vector(offset, "offset", self.dimension))


class _Mean:
    """Of the losses of batches, by their weights; NaN for none."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: Tensor, weight: float) -> None:
        self._sum += weight * loss.item()
        self._weight += weight

    @property
    def value(self) -> float:
        return self._sum / self._weight
