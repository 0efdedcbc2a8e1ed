"""What a step is refused for before anything is written, and what it is warned of: the sentences, apart from the moves."""

from __future__ import annotations

import warnings
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor

from sam_fused.compiled import not_traced

from .state import State
from .wrapper import Wrapper

grad_of = attrgetter("grad")


class Refusals(Wrapper):
    """Each raises if the step that is about to be taken is one that would go wrong silently."""

    _BLOCK: str  # the second pass by hand
    _KEEPING_GRADIENTS: str  # what to do with gradients that are there already

    @not_traced
    def _refuse_scaled_closure(self) -> None:
        if "found_inf" in self.__dict__:
            raise RuntimeError(
                "step(closure): expected gradients without a loss scale, got a closure through GradScaler.step: run the two "
                f"backward passes by hand, `scaler.scale(loss).backward()`, `with optimizer.{self._BLOCK}: "
                "scaler.scale(loss_fn()).backward()`, then `scaler.step(optimizer)`."
            )

    def _refuse_unscaled_too_early(self) -> None:
        """The scaler says that ``unscale_`` was called, which walks over the parameter groups: when did it?

        Before the second backward it unscaled the first pass's gradients, and the second's would be applied with their scale
        on. (Tensors' version counters do not tell: the scaler's kernel leaves them alone.)
        """
        if self._control.state is not State.CLEAN and not self._control.gradients.were_read:
            raise RuntimeError(
                "step(): expected the second pass's gradients to be unscaled, got scaler.unscale_(optimizer) before the second "
                "backward: call unscale_ (and clip) after it, right before scaler.step(optimizer), or not at all."
            )

    def _refuse_unknown_scale(self) -> None:
        if self._control.scale_unknown and self._control.state is not State.CLEAN:
            raise RuntimeError(
                "step(): expected a perturbation that knew the loss scale, because with normalize=False or "
                "weight_decay_in_ascent it depends on the size of the gradients, got a GradScaler and none: pass "
                "grad_scale=scaler.get_scale() to first_step(), perturbed() or micro_batch(), after restore()."
            )

    def _refuse_unused_ascent_closure(self, closure: Any, ascent_closure: Any, first_pass_done: bool) -> None:
        if ascent_closure is not None and (closure is None or first_pass_done or self._control.state is State.READY):
            raise RuntimeError(
                "step(closure, ascent_closure=...): expected both passes to be run by step, got "
                f"{'no closure for the second one' if closure is None else 'a first pass that is done'}: leave ascent_closure "
                "out, or pass both and nothing before."
            )

    @not_traced
    def _refuse_fresh_gradients(self) -> None:
        fresh = self._control.gradients.fresh(list(map(grad_of, self._params())))
        if not fresh:
            return
        raise RuntimeError(
            "step(closure): expected no gradients but those of the previous step, because the first pass clears them, got "
            f"{len(fresh)} fresh ones: call zero_grad() to drop them, or {self._KEEPING_GRADIENTS}."
        )

    def _warn_of_no_gradients(self, grads: list[Tensor | None]) -> None:
        """A second pass without backward would train nothing, and say nothing: every parameter is skipped as an unused one."""
        if not self._control.warned and not any(map(is_not, grads, repeat(None))):
            self._control.warned = True
            warnings.warn(
                "SAM: expected gradients from the second pass, found none on any parameter, so this step changes nothing; call "
                "backward() at the perturbed weights.",
                stacklevel=5,
            )
