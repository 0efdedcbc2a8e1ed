"""Inside compiled code: what the optimizer does on the host is called, not traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def not_traced(function: Callable[P, R]) -> Callable[P, R]:
    """A compiler that traces through a whole training step breaks its graph here once, and runs the function as it is.

    Traced into, it would break at every address that is looked up and every list that is compared, to win nothing: the
    arithmetic is in kernels that it cannot look into. Outside compiled code this costs a call; ``torch.compiler.disable`` alone
    would import the compiler for everybody, two seconds.
    """
    untraced = _disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call
