"""Interrupts between any two lines of the optimizer layer."""

import sys
from pathlib import Path

import torch

import sam_fused

# An interrupt may come between any two lines. The line where it comes is chosen by a trace function.

_PACKAGE = Path(sam_fused.__file__).parent
_TRACED = tuple(str(_PACKAGE / name) for name in ("optim", "ops/prepared.py"))
_TRACED_OPERATIONS = (*_TRACED, *(str(_PACKAGE / "ops" / name) for name in ("foreach.py", "reference.py", "functional.py")))


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the files traced."""

    def __init__(self, number, traced=_TRACED):
        self.number, self.count, self.where, self.traced = number, 0, None, traced

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.traced):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.number:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def during(self, action):
        """Whether the action was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # an interrupt on leaving no_grad leaves it on
        return False


def interrupted_everywhere(prepare, operations=False):
    """For every line n: ``prepare()`` gives the action to interrupt and a check that takes the place of the interrupt."""
    number, problems = 0, []
    while True:
        number += 1
        action, check = prepare()
        interrupt = Interrupt(number, _TRACED_OPERATIONS if operations else _TRACED)
        if not interrupt.during(action):
            assert number > 20
            break
        problem = check()
        if problem:
            problems.append(f"{interrupt.where}: {problem}")
    assert not problems, sorted(set(problems))
