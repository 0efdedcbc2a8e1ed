"""Sharpness-Aware Minimization as a ``torch.optim`` optimizer: the moves of a step, and no arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_fused.batch_norm import RunningStatistics
from sam_fused.compiled import not_traced
from sam_fused.ops import backends
from sam_fused.ops.hyper import is_known, number
from sam_fused.ops.metrics import PerturbationMetrics
from sam_fused.randomness import Randomness

from . import groups
from .arguments import (
    NOT_GIVEN,
    check_limit,
    check_norm,
    check_params,
    inverse_of,
    keys_of,
    own_settings,
    own_values,
    refuse_hidden,
)
from .closures import Losses, check_callable, detached, evaluate
from .definitions import scaling_of
from .descent import Final, is_capturable
from .refusals import Refusals, grad_of
from .state import Control, Move, State


def _has_no_lr(group: dict[str, Any]) -> bool:
    lr = group.get("lr")
    return lr is not None and is_known(lr) and float(number(lr)) == 0


class SAM(Refusals):
    r"""Sharpness-Aware Minimization [2010.01412] around any ``torch.optim`` optimizer.

    .. math::
        e = \rho \, g / (\lVert g \rVert_2 + \epsilon), \qquad
        w \leftarrow \mathrm{base}(w, \nabla L(w + e))

    ``g`` is the gradient at the clean weights; the norm is one norm over the perturbed parameters of all groups. The weights
    are restored bit for bit. With ``adaptive``, :math:`e = \rho \, T^2 g / (\lVert T g \rVert + \epsilon)` (ASAM
    [2102.11600]); T is :math:`|w|` on all parameters for True, as in the popular class. With a base that maximizes, e points
    downhill.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Args:
        params: what ``torch.optim`` optimizers take; or a base optimizer, ``SAM(optimizer, rho=0.05)``.
        base_optimizer: the base optimizer's class; left out when an optimizer is given.
        rho: the radius of the perturbation, >= 0. Per group: the key ``rho``. 0 is the base optimizer.
        adaptive: ASAM's T by its definition: ``"all"``, ``|w| + eta`` for every tensor (what True means); ``"weights"``, the
            same for tensors called weight and 1 for all others, as in the authors' class, for which the names have to be
            known: pass ``model.named_parameters()``, or ``model``; ``"layerwise"``, a tensor's norm ``||w||``, as in SAM-ON
            [2306.04226]. Per group: the key ``adaptive``.
        perturb: False leaves a group out of the perturbation, out of the norm and out of the backups; with the groups of
            ``norm_parameters(model)`` that is SAM-ON [2306.04226]. Per group: the key ``perturb``.
        eta: added to ``|w|``, >= 0; only with 0 is ASAM invariant to rescaling. Per group: the key ``eta``.
        weight_decay_in_ascent: perturb along ``g + weight_decay w``, the gradient of the loss that the base optimizer's coupled
            weight decay stands for, as the authors of SAM do. Per group: a key of this name.
        p: the norm that bounds the perturbation: 2, or ``math.inf`` for ``e = rho sign(g)``, ``rho T sign(g)`` if adaptive.
        normalize: False is ``e = rho g``, ``rho T^2 g`` if adaptive, as in much of the theory [2206.06232].
        perturb_eps: added to the norm. Per group: the key ``perturb_eps``. Never ``eps``, which is the base optimizer's.
        max_grad_norm: clips the norm of the step's gradient, over the parameters of all groups, as
            ``torch.nn.utils.clip_grad_norm_`` before the base step would: the factor is applied inside the last pass, and
            ``.grad`` keeps what it held. A float, or a tensor on the device.
        model: its running statistics (batch norm's) see the first pass only; see ``sam_fused.freeze_batch_norm_stats``.
        same_dropout: the second pass draws the random numbers of the first, on the CPU and on the parameters' CUDA devices. By
            hand, call ``remember_randomness()`` before the first forward pass.
        capturable: hyper-parameters live in tables on the parameters' device, at one address, so that a captured CUDA graph
            sees them change. (Adam has a keyword of this name; given to it, it is this one as well.)
        backend: ``"native"``, ``"triton"``, ``"foreach"`` or ``"reference"``; None chooses, see ``python -m sam_fused.info``.
        track_perturbation: measure the realised perturbation in every step, into ``perturbation`` (slow: for looking).
        **base_kwargs: the base optimizer's arguments. A base with a keyword of ours (Adadelta's ``rho``) keeps it, and ours
            is called ``sam_rho`` in the groups and here.

    Attributes:
        base_optimizer: the base optimizer. Groups and state are shared with it, LR schedulers may use either.
        grad_norm: the norm of the last step's gradient before clipping, a 0-dim tensor on its device, with ``max_grad_norm``;
            else None.
        ascent_overflows: how many first passes had a norm that was inf or NaN, so that the step was a plain base step: a 0-dim
            int64 tensor on the parameters' device.
        losses: ``Losses`` of the last ``step(closure)``; what it did not see is None in it.
        perturbation: ``PerturbationMetrics`` of the last ascent with ``track_perturbation``, or None.

    Raises:
        TypeError: a base that is no optimizer class or instance, or cannot be one here (LBFGS, SparseAdam, SAM).
        ValueError: a hyper-parameter out of range.
    """

    # The scaler leaves unscaling and skipping to `step`; otherwise it would skip `step` after an overflow in the second
    # pass, and the weights would stay perturbed.
    _step_supports_amp_scaling = True
    _BLOCK = "perturbed()"  # of the second pass by hand
    _KEEPING_GRADIENTS = (
        "step(closure, first_pass_done=True) to use them as the first pass, perturbed() to run both passes by hand, or "
        "MicroBatchSAM to perturb along each chunk of an accumulated batch"
    )

    def __init__(
        self,
        params: Iterable[Any] | Optimizer,
        base_optimizer: type[Optimizer] | None = None,
        rho: float = groups.DEFAULTS["rho"],
        adaptive: bool | str = groups.DEFAULTS["adaptive"],
        *,
        perturb: bool = groups.DEFAULTS["perturb"],
        perturb_eps: float = groups.DEFAULTS["perturb_eps"],
        eta: float = groups.DEFAULTS["eta"],
        weight_decay_in_ascent: bool = groups.DEFAULTS["weight_decay_in_ascent"],
        p: float = 2,
        normalize: bool = True,
        max_grad_norm: float | Tensor | None = NOT_GIVEN,
        model: nn.Module | None = None,
        same_dropout: bool = False,
        capturable: bool = False,
        backend: str | None = None,
        track_perturbation: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(params, SAM) or (isinstance(base_optimizer, type) and issubclass(base_optimizer, SAM)):
            raise TypeError("base_optimizer: expected a base optimizer, got SAM itself: pass its base_optimizer.")
        base_keys = keys_of(params, base_optimizer)
        backends.check_name(backend)
        names = groups.key_names(base_keys)
        own = {
            "p": p,
            "normalize": normalize,
            "max_grad_norm": max_grad_norm,
            "model": model,
            "same_dropout": same_dropout,
            "capturable": capturable,
        }
        settings: dict[str, Any] = own_settings(kwargs, own, base_keys)
        given = {
            "rho": rho,
            "adaptive": adaptive,
            "perturb": perturb,
            "perturb_eps": perturb_eps,
            "eta": eta,
            "weight_decay_in_ascent": weight_decay_in_ascent,
        }
        # By identity: a base optimizer that has such a keyword itself must see that it was given, whatever its value.
        kwargs |= {name: value for name, value in given.items() if value is not groups.DEFAULTS[name]}
        asked = [name for name in names if name in kwargs]
        values = own_values(kwargs, names, params, base_optimizer)
        if isinstance(params, Optimizer):
            if kwargs:
                raise TypeError(
                    f"SAM: expected no arguments for the base optimizer because it is given as an instance, got "
                    f"{', '.join(sorted(kwargs))}: set them where {type(params).__name__} is constructed."
                )
            base = params
        else:
            assert base_optimizer is not None
            base = base_optimizer(params, **kwargs)
        for group in base.param_groups:
            check_params(group["params"])
        names = refuse_hidden(base, names, {name: value for name, value in values.items() if name in asked})
        check_limit(settings["max_grad_norm"])
        check_norm(settings["p"], settings["normalize"])
        for index, group in enumerate(base.param_groups):
            groups.refuse_settings(group, base.defaults, names, index)
        groups.fill(base, names, values)
        for group in base.param_groups:
            scaling_of(group, group[names["adaptive"]], settings["model"])
        self._attach(base, names, values, Control(backend=backend, track_perturbation=track_perturbation, **settings))

    # ---- settings and readings ---------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """False makes every form of the step the base optimizer's: ``step(closure)`` then calls the closure once."""
        return self._control.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._control.enabled = bool(value)

    @property
    def max_grad_norm(self) -> float | Tensor | None:
        """The limit of the gradient's norm; None: no limit."""
        return self._control.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | Tensor | None) -> None:
        check_limit(value)
        self._control.max_grad_norm = value

    @property
    def grad_norm(self) -> Tensor | None:
        return self._control.grad_norm

    @property
    def ascent_overflows(self) -> Tensor:
        overflows = self._control.overflows
        return torch.zeros((), dtype=torch.int64) if overflows is None else overflows

    @property
    def losses(self) -> Losses:
        return Losses(self._control.clean_loss, self._control.perturbed_loss)

    @property
    def perturbation(self) -> PerturbationMetrics | None:
        return self._control.perturbation  # type: ignore[no-any-return]

    # ---- the forms of a step -----------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        ascent_closure: Callable[[], Any] | None = None,
        first_pass_done: bool = False,
    ) -> Any:
        """Takes a step.

        With a closure (forward, backward, return the loss): clears the gradients, calls it, perturbs, clears, calls it again,
        restores and takes the base step. Without: restores if ``first_step`` came before, and takes the base step.

        Args:
            closure: re-evaluates the model; called twice, once while ``enabled`` is False.
            ascent_closure: called in the first pass instead, so that the weights are perturbed along another loss (Bi-SAM's
                [2407.12993] is ``sam_fused.bisam_ascent_loss``) or another batch. Not called while ``enabled`` is False.
            first_pass_done: the gradients of the first pass are already there; the closure is called once, and not at all while
                ``enabled`` is False: they are the base step's then.

        Returns:
            The clean loss; the closure's own where it is not called at the clean weights, with ``ascent_closure`` or
            ``first_pass_done``; None without a closure, or where it is not called.

        Raises:
            RuntimeError: not possible in the present state; or a gradient is there that the first pass would drop; or the
                closure came through ``GradScaler.step``. The weights are clean then, and nothing was changed.
        """
        with self._scale_of_this_step():
            return self._take_step(closure, ascent_closure, first_pass_done)

    def _take_step(
        self,
        closure: Callable[[], Any] | None,
        ascent_closure: Callable[[], Any] | None = None,
        first_pass_done: bool = False,
    ) -> Any:
        """``step``, which torch has wrapped into hooks and a profiler's range: those are for one call of it."""
        check_callable(closure, "step(closure)")
        check_callable(ascent_closure, "step(closure, ascent_closure=)")
        self._refuse_unused_ascent_closure(closure, ascent_closure, first_pass_done)
        if closure is None:
            return self._step_without_closure()
        return self._step_with_closure(closure, ascent_closure, first_pass_done)

    @contextmanager
    def _scale_of_this_step(self) -> Iterator[None]:
        evaluating = self._control.evaluating  # by a step around this one, which is about to be refused
        try:
            yield
        except BaseException:
            self._control.evaluating = evaluating
            # A scaler takes these back only after a step that returned; left here they would scale the next one twice.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step_with_closure(
        self, closure: Callable[[], Any], ascent_closure: Callable[[], Any] | None, first_pass_done: bool
    ) -> Any:
        self._refuse_scaled_closure()
        self._control.require(Move.STEP_CLOSURE)
        if self._control.state is State.READY:
            loss = evaluate(self._control, closure)
            self._base_step()
            return loss
        if not first_pass_done:
            self._refuse_fresh_gradients()
        try:
            clean_loss = None
            if not first_pass_done:
                self._clear_gradients()
            if not self._control.enabled:
                clean_loss = None if first_pass_done else evaluate(self._control, closure)
                self._base_step()
                self._control.clean_loss = detached(clean_loss)
                return clean_loss
            if not first_pass_done:
                if self._control.same_dropout:
                    self.remember_randomness()
                if ascent_closure is None:
                    clean_loss = evaluate(self._control, closure)
                else:
                    evaluate(self._control, ascent_closure)
            with self._perturbed_until_error():
                perturbed_loss = evaluate(self._control, closure)
                self._base_step()
        except BaseException:
            self._give_up()
            self._remember_gradients()  # half a pass's: nobody's to keep, so the next step may clear them
            raise
        self._control.clean_loss = detached(clean_loss)
        self._control.perturbed_loss = detached(perturbed_loss)
        return clean_loss if ascent_closure is None and not first_pass_done else perturbed_loss

    @contextmanager
    def perturbed(self, *, grad_scale: float | Tensor | None = None) -> Iterator[None]:
        """The second pass by hand: on entry the weights move to ``w + e`` and the gradients become None; on the way out, also
        by an exception, the weights are restored bit for bit. Then call ``step()``.

        Args:
            grad_scale: the loss scale that is on the gradients, ``scaler.get_scale()``; needed where e depends on the size of
                the gradient (``normalize=False``, ``weight_decay_in_ascent``), and of no consequence elsewhere.

        Raises:
            RuntimeError: the weights are perturbed already.
            ValueError: ``grad_scale`` is not a number above 0.
        """
        self._control.require(Move.PERTURBED)
        with self._perturbed_until_error(grad_scale=grad_scale):
            self._control.gradients.begin_second_pass([])
            yield
            self._ascent.restore()
            self._settle(State.READY)

    def first_step(self, zero_grad: bool = False, *, grad_scale: float | Tensor | None = None) -> None:
        """Moves the weights to ``w + e``, with the gradients that are there. Then: forward, backward, ``second_step``.

        Args:
            zero_grad: clears the gradients afterwards.
            grad_scale: as for ``perturbed``.

        Raises:
            RuntimeError: the weights are perturbed already.
            ValueError: ``grad_scale`` is not a number above 0.
        """
        self._control.require(Move.FIRST_STEP)
        try:
            self._ascend(grad_scale=grad_scale)
            self._control.state = State.PERTURBED
            self._control.gradients.begin_second_pass([] if zero_grad else list(map(grad_of, self._params())))
        except BaseException:  # an interrupt between the two lines, too
            self._give_up()
            raise
        if zero_grad:
            self._clear_gradients()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and takes the base step with the gradients that are there, through ``step``, so that hooks and
        LR schedulers see it.

        Raises:
            RuntimeError: ``first_step`` was not called.
        """
        self._control.require(Move.SECOND_STEP)
        self.step()
        if zero_grad:
            self._clear_gradients()

    def restore(self) -> None:
        """Gives a step up: the weights are restored bit for bit if ``first_step`` moved them, and no base step is taken.

        Raises:
            RuntimeError: inside a ``perturbed()`` block or a closure, which restore by themselves.
        """
        self._control.require(Move.RESTORE)
        self._give_up()

    @not_traced
    def remember_randomness(self) -> None:
        """With ``same_dropout`` and both passes by hand: to be called before the first forward pass, so that the second draws
        the same random numbers. ``step(closure)`` does it by itself."""
        self._control.randomness = Randomness({param.device for param in self._params()})
        self._control.randomness.record()

    # ---- the moves ---------------------------------------------------------------------------------------------------

    def _step_without_closure(self) -> None:
        # Where every learning rate is 0 nothing can be trained wrongly: so distributed checkpointing materialises state.
        begun = self._control.state is not State.CLEAN or self._control.evaluating
        if begun or (self._control.enabled and not all(map(_has_no_lr, self.base_optimizer.param_groups))):
            self._control.require(Move.STEP)
        self._base_step()

    @not_traced
    def _ascend(self, *, same_step: bool = False, grad_scale: float | Tensor | None = None) -> None:
        """Perturbs with the present gradients, and prepares what surrounds the second pass."""
        control = self._control
        inv_scale = inverse_of(grad_scale)
        control.perturbation = None
        if not same_step:
            control.scale_unknown = False
        if not control.enabled:
            self._ascent.nothing()
            return
        if control.same_dropout and (control.randomness is None):
            raise RuntimeError(
                "same_dropout: expected the random numbers of the first pass to be known, got a first pass by hand: call "
                "remember_randomness() before its forward."
            )
        params = self._params()
        grads = list(map(grad_of, params))
        base = self.base_optimizer
        self._fill.fill(base)
        if not control.warned and not any(map(is_not, grads, repeat(None))):
            control.warned = True
            warnings.warn(
                "SAM: expected gradients to perturb along, found none on any parameter, so this step is the base optimizer's "
                "alone; call backward() before first_step() or perturbed(), and in the closure of step(closure).",
                stacklevel=4,
            )
        capturable = is_capturable(control, base)
        groups = base.param_groups
        self._ascent.perturb(groups, params, grads, capturable=capturable, same_step=same_step, inv_scale=inv_scale)
        control.scale_unknown |= grad_scale is None and self._ascent.needs_scale
        if control.model is not None:
            if control.statistics is None:
                control.statistics = RunningStatistics(control.model)
            control.statistics.save()
        if control.same_dropout and control.randomness is not None:
            control.randomness.replay()
            control.randomness = None  # the next step has random numbers of its own

    @contextmanager
    def _perturbed_until_error(self, *, same_step: bool = False, grad_scale: float | Tensor | None = None) -> Iterator[None]:
        try:
            self._ascend(same_step=same_step, grad_scale=grad_scale)
            self._control.state = State.INSIDE
            self._clear_gradients()
            yield
        except BaseException:
            self._give_up()
            raise

    @not_traced
    def _settle(self, state: State) -> None:
        """The weights are clean, the second pass is over."""
        try:
            if self._control.statistics is not None:
                self._control.statistics.put_back()
        finally:
            self._control.state = state
            if state is State.CLEAN:
                self._control.randomness = None  # the next step has random numbers of its own

    @not_traced
    def _give_up(self) -> None:
        """Back to clean weights, whatever has happened."""
        try:
            self._ascent.restore()
        finally:
            self._settle(State.CLEAN)

    @not_traced
    def _base_step(self, final: Final | None = None) -> None:
        """Restores what is perturbed and runs the base optimizer, in one pass where it has a fused form."""
        params = self._params()
        scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if final is None:
            final = Final(list(map(grad_of, params)), grad_scale=scale, found_inf=found_inf)
        if found_inf is not None:
            self._refuse_unknown_scale()
            if scale is None:
                self._refuse_unscaled_too_early()
        if self._control.state is not State.CLEAN:
            self._warn_of_no_gradients(final.grads)
        self._descent.stepped = False
        try:
            self._descent.step(self.base_optimizer, self._ascent, params, final)
            self._settle(State.CLEAN)
        except BaseException:
            if self._descent.stepped:  # an interrupt after the fact: the step is over, it must not be taken twice
                self._descent.note_stepped(self._ascent)
                self._give_up()
            raise
        self._control.clean_loss = self._control.perturbed_loss = None
        self._note_step()
        self._remember_gradients()

    def _note_step(self) -> None:
        """What an LR scheduler looks for on either optimizer to know that a step was taken."""
        self.base_optimizer._opt_called = self._opt_called = True  # type: ignore[attr-defined]

    @not_traced
    def _clear_gradients(self) -> None:
        for param in self._params():
            param.grad = None

    @not_traced
    def _remember_gradients(self) -> None:
        self._control.gradients.remember(list(map(grad_of, self._params())))

    def _refresh_hyper(self) -> None:
        """What has changed in the groups since, into the tables that a captured step reads."""
        self._ascent.refresh_hyper(self.base_optimizer.param_groups)
        self._descent.refresh_hyper(self.base_optimizer)
