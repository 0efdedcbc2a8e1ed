"""Micro-batch SAM: one perturbation per micro-batch, one base step per batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import repeat
from numbers import Real
from operator import is_not
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_fused.compiled import not_traced

from . import batches, groups
from .accumulation import TOLERANCE, Accumulation
from .closures import check_callable, detached, evaluate, mean_loss
from .descent import Final
from .refusals import grad_of
from .sam import SAM
from .state import Control, Move, State


class MicroBatchSAM(SAM):
    r"""Micro-batch SAM (mSAM) [2212.04343, 2302.09693] around any ``torch.optim`` optimizer.

    .. math::
        w \leftarrow \mathrm{base}\Big(w, \sum_k \tfrac{|S_k|}{|B|} \nabla L_{S_k}(w + e_k)\Big), \qquad
        e_k = \rho \, g_k / (\lVert g_k \rVert_2 + \epsilon), \quad g_k = \nabla L_{S_k}(w)

    for a batch B cut into micro-batches :math:`S_k`, with the mean loss of each: every micro-batch has a perturbation of its
    own, the base optimizer sees one gradient. With one micro-batch it is SAM, with as many as samples it is one perturbation
    per sample. Memory for activations is a micro-batch's; the optimizer holds a backup and an accumulator, however many.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = MicroBatchSAM(model.parameters(), torch.optim.SGD, num_micro_batches=4, lr=0.1)
        >>> def closure(x, y):
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure, torch.randn(8, 3), torch.randn(8, 1))

    Or by hand, in any loop:
        >>> for x, y in zip(torch.randn(4, 2, 3), torch.randn(4, 2, 1)):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(model(x), y).backward()
        ...     with optimizer.micro_batch(weight=1 / 4):
        ...         torch.nn.functional.mse_loss(model(x), y).backward()
        >>> optimizer.step()

    Args:
        num_micro_batches: into how many ``step(closure, *batch)`` cuts a batch, >= 1; may be set between steps.
        **kwargs: those of ``SAM``.

    Raises:
        ValueError: ``num_micro_batches`` is not a whole number above 0.
    """

    _BLOCK = "micro_batch(weight=...)"
    _KEEPING_GRADIENTS = "micro_batch() to run both passes by hand"

    def __init__(
        self,
        params: Iterable[Any] | Optimizer,
        base_optimizer: type[Optimizer] | None = None,
        rho: float = groups.DEFAULTS["rho"],
        adaptive: bool | str = groups.DEFAULTS["adaptive"],
        *,
        num_micro_batches: int,
        **kwargs: Any,
    ) -> None:
        _check_count(num_micro_batches)
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)
        self._control.num_micro_batches = num_micro_batches

    def _attach(self, base: Optimizer, names: dict[str, str], values: dict[str, Any], control: Control) -> None:
        super()._attach(base, names, values, control)
        self._accumulation = Accumulation(control)

    @property
    def num_micro_batches(self) -> int:
        """Into how many micro-batches ``step(closure, *batch)`` cuts a batch."""
        return self._control.num_micro_batches

    @num_micro_batches.setter
    def num_micro_batches(self, value: int) -> None:
        self._control.require(Move.SET_NUM_MICRO_BATCHES)
        _check_count(value)
        self._control.num_micro_batches = value

    # ---- the forms of a step -----------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        closure: Callable[..., Any] | None = None,
        *batch: Any,
        ascent_closure: Callable[..., Any] | None = None,
        first_pass_done: bool = False,
    ) -> Any:
        """Takes a step.

        With a closure: cuts the tensors of ``batch`` along their first dimension, in nested containers too, and for each
        micro-batch clears the gradients, calls ``closure(*micro_batch)`` (forward, backward, return the mean loss), perturbs,
        clears, calls it again, restores and adds up; the last micro-batch's restore is the base step. Gradients are None
        afterwards. Without a closure: the base step, after ``micro_batch`` blocks whose weights sum to 1. An
        ``ascent_closure`` is called on each micro-batch in the first pass instead, as in ``SAM.step``. While ``enabled`` is
        False that is plain accumulation: one call for each micro-batch, their gradients added up as ever, the base step.

        With one micro-batch it takes what ``SAM.step`` takes, too: a closure without a batch, and ``first_pass_done``.

        Returns:
            The batch's clean loss, the weighted mean of the micro-batches', detached, on its device; with ``ascent_closure``
            the mean of the closure's own losses; None without a closure.

        Raises:
            RuntimeError: not possible in the present state; a gradient is there that the first pass would drop; the closure
                came through ``GradScaler.step``; the closure calls no ``backward``.
            TypeError: the closure returns no scalar loss; the batch holds packed or nested sequences.
            ValueError: the batch cannot be cut. The weights are clean then, and nothing was changed.
        """
        with self._scale_of_this_step():
            if closure is None:
                if batch:
                    raise TypeError(
                        "step(closure, *batch): expected a closure for the batch, got None: pass what runs forward and "
                        "backward on a micro-batch, or step() alone after micro_batch() blocks."
                    )
                return self._take_step(None, ascent_closure)
            if callable(closure) and self._control.num_micro_batches == 1 and (first_pass_done or not batch):
                ascent = None if ascent_closure is None else partial(ascent_closure, *batch)
                return self._take_step(partial(closure, *batch), ascent, first_pass_done)
            if first_pass_done:
                raise RuntimeError(
                    f"step(closure, first_pass_done=True): expected one micro-batch, got {self._control.num_micro_batches}, "
                    "each with a first pass of its own: leave it out, or run both passes by hand with micro_batch()."
                )
            check_callable(closure, "step(closure, *batch)")
            check_callable(ascent_closure, "step(closure, *batch, ascent_closure=)")
            self._refuse_scaled_closure()
            self._control.require(Move.STEP_CLOSURE)
            self._refuse_a_batch_between_passes()
            pieces = batches.micro_batches(batch, self._control.num_micro_batches)
            self._refuse_fresh_gradients()
            return self._step_over(closure, ascent_closure, pieces)

    def _step_over(
        self,
        closure: Callable[..., Any],
        ascent_closure: Callable[..., Any] | None,
        pieces: list[tuple[tuple[Any, ...], int]],
    ) -> Any:
        sizes = [size for _, size in pieces]
        samples = sum(sizes)
        clean_losses, perturbed_losses = [], []
        two_losses = ascent_closure is not None and self._control.enabled
        try:
            for number, (arguments, size) in enumerate(pieces):
                weight = size / samples
                self._clear_gradients()
                if self._control.same_dropout and self._control.enabled:
                    self.remember_randomness()
                if two_losses:
                    assert ascent_closure is not None
                    self._pass(ascent_closure, arguments, returns_loss=False)
                else:
                    clean_losses.append(self._pass(closure, arguments))
                perturbed = self._perturbed_until_error(same_step=number > 0) if self._control.enabled else nullcontext()
                with perturbed:
                    if self._control.enabled:
                        perturbed_losses.append(self._pass(closure, arguments))
                    else:
                        self._ascent.nothing()
                    if number == len(pieces) - 1:
                        self._last(weight)
                    else:
                        self._add(weight)
        except BaseException:
            self._give_up()
            self._clear_gradients()  # half a batch's: nobody's to keep
            raise
        weights = [size / samples for size in sizes]
        if two_losses:
            self._control.perturbed_loss = mean_loss(perturbed_losses, weights)
            return self._control.perturbed_loss
        return self._note_losses(clean_losses, perturbed_losses, weights)

    @not_traced
    def _note_losses(self, clean_losses: list[Any], perturbed_losses: list[Any], weights: list[float]) -> Any:
        """The batch's losses, into ``losses``; returns the clean one."""
        clean = self._control.clean_loss = mean_loss(clean_losses, weights)
        if perturbed_losses:
            self._control.perturbed_loss = mean_loss(perturbed_losses, weights)
        return clean

    def _pass(self, closure: Callable[..., Any], arguments: tuple[Any, ...], returns_loss: bool = True) -> Any:
        """One evaluation of the closure on a micro-batch, with what it has to leave behind checked."""
        loss = evaluate(self._control, closure, *arguments)
        is_scalar = isinstance(loss, Tensor) and loss.numel() == 1
        if returns_loss and not is_scalar and (isinstance(loss, bool) or not isinstance(loss, Real)):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                "step(closure, *batch): expected a closure that returns the micro-batch's mean loss, a scalar, got "
                f"{got}: return it."
            )
        if not self._has_gradients():
            raise RuntimeError(
                "step(closure, *batch): expected a closure that calls backward(), got no gradient on any parameter: call "
                "loss.backward() in it, before it returns the loss."
            )
        return detached(loss)

    @contextmanager
    def micro_batch(self, weight: float | None = None, *, grad_scale: float | Tensor | None = None) -> Iterator[None]:
        """The second pass of one micro-batch by hand: on entry the weights move to ``w + e`` along the gradients that are
        there, which become None; on the way out the weights are restored bit for bit and ``weight`` times the gradient is added
        up. Gradients are None afterwards. When the weights of all micro-batches sum to 1, ``.grad`` is the step's gradient:
        clip it, unscale it, look at it, and call ``step()``.

        An exception gives the whole step up: the weights are clean and nothing is added up any more.

        Args:
            weight: the micro-batch's share of the batch, ``|S_k| / |B|``, for the mean loss of each; default
                ``1 / num_micro_batches``.
            grad_scale: as for ``SAM.perturbed``.

        Raises:
            RuntimeError: the weights are perturbed already; all micro-batches have been run and ``step()`` was not called.
            ValueError: the weight is not above 0, or brings the sum above 1.
        """
        weight = 1 / self._control.num_micro_batches if weight is None else weight
        self._control.require(Move.MICRO_BATCH)
        self._check_weight(weight)
        try:
            with self._perturbed_until_error(same_step=self._accumulation.count > 0, grad_scale=grad_scale):
                self._control.gradients.begin_second_pass([])
                yield
                if not self._has_gradients():
                    raise RuntimeError(
                        "micro_batch(): expected the second pass inside the block, got no gradient on any parameter: run "
                        "forward and backward() of the micro-batch in it."
                    )
                self._add(float(weight))
            self._control.gradients.were_read = False  # the sum is still to come
            self._clear_gradients()
            if self._accumulation.is_complete:
                self._accumulation.expose(self._params())
                self._control.state = State.COMPLETE
        except BaseException:
            self._give_up()
            raise

    def perturbed(self, *, grad_scale: float | Tensor | None = None) -> Any:
        """SAM's second pass over a whole batch; only with ``num_micro_batches=1``, where it is ``micro_batch``'s.

        Raises:
            RuntimeError: there are several micro-batches.
        """
        self._refuse_whole_batches("perturbed()")
        return super().perturbed(grad_scale=grad_scale)

    def first_step(self, zero_grad: bool = False, *, grad_scale: float | Tensor | None = None) -> None:
        """``SAM.first_step``; only with ``num_micro_batches=1``.

        Raises:
            RuntimeError: there are several micro-batches.
        """
        self._refuse_whole_batches("first_step()")
        super().first_step(zero_grad, grad_scale=grad_scale)

    # ---- the moves ---------------------------------------------------------------------------------------------------

    @not_traced
    def _add(self, weight: float) -> None:
        """The end of a micro-batch: restored, and added up."""
        params = self._params()
        self._accumulation.add(self._ascent, params, list(map(grad_of, params)), weight)
        self._ascent.note_clean()
        self._settle(State.ACCUMULATED)

    @not_traced
    def _last(self, weight: float) -> None:
        """The end of the last micro-batch: the base step, in one pass with the restore where that can be."""
        accumulation, params = self._accumulation, self._params()
        grads = list(map(grad_of, params))
        if accumulation.count == 0:
            self._base_step()
        elif accumulation.covers(grads) and self._descent.is_fused(self.base_optimizer, params):
            share = partial(accumulation.weight_on, weight)
            self._base_step(Final(grads, accumulators=accumulation.accumulators(params), weight=share))
        else:
            self._add(weight)
            accumulation.expose(params)
            self._base_step(Final(accumulation.accumulators(params), wide=True))
        self._clear_gradients()

    @not_traced
    def _base_step(self, final: Final | None = None) -> None:
        if final is None and self._accumulation.count:
            scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
            grads = self._accumulation.gradients(self._params())
            self._refuse_dropped_gradients(grads)
            wide = any(g is not None and g.dtype != p.dtype for g, p in zip(grads, self._params(), strict=True))
            final = Final(grads, wide=wide, grad_scale=scale, found_inf=found_inf)
        super()._base_step(final)

    @not_traced
    def _settle(self, state: State) -> None:
        super()._settle(state)
        if state is State.CLEAN:  # a step was taken or given up
            self._accumulation.reset()

    @not_traced
    def _has_gradients(self) -> bool:
        return any(map(is_not, map(grad_of, self._params()), repeat(None)))

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def _check_weight(self, weight: Any) -> None:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or not float(weight) > 0:
            raise ValueError(
                f"micro_batch(weight=): expected the micro-batch's share of the batch, a number above 0, got {weight!r}: pass "
                "len(micro_batch) / len(batch)."
            )
        total = self._accumulation.weight + float(weight)
        if total > 1 + TOLERANCE:
            raise ValueError(
                f"micro_batch(weight=): expected weights that sum to 1 over a batch, got {total:.6g} with this one: pass "
                "len(micro_batch) / len(batch), and losses that are means over their micro-batch."
            )

    def _refuse_whole_batches(self, move: str) -> None:
        if self._control.num_micro_batches > 1:
            raise RuntimeError(
                f"{move}: expected micro_batch() because there are {self._control.num_micro_batches} micro-batches, got a form "
                "for whole batches: use `with optimizer.micro_batch(weight=...)`, step(closure, *batch), or SAM."
            )

    def _refuse_dropped_gradients(self, grads: list[Tensor | None]) -> None:
        """A step with no gradient at all after a whole batch: a ``zero_grad()`` at the end of the loop's body."""
        if not any(map(is_not, grads, repeat(None))):
            raise RuntimeError(
                "step(): expected the batch's gradient in .grad after the last micro_batch() block, got None on every "
                "parameter: call zero_grad() before each first pass and not after a block, or restore() to give the step up."
            )

    def _refuse_a_batch_between_passes(self) -> None:
        """After ``perturbed()`` SAM takes a closure for the gradients of the step; a batch would be two passes more."""
        if self._control.state is State.READY:
            raise RuntimeError(
                "step(closure, *batch) is not possible while a perturbed() block was left and its step has not been taken: "
                "call step() first, or restore() to give the step up."
            )

    # ---- torch.optim's interface ---------------------------------------------------------------------------------------

    def release_buffers(self) -> None:
        super().release_buffers()
        self._accumulation.release()

    @property
    def buffer_bytes(self) -> int:
        return self._ascent.buffer_bytes + self._accumulation.nbytes


def _check_count(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_micro_batches: expected a whole number above 0, got {value!r}: 1 is SAM, 8 cuts a batch into 8.")
