"""Interrupts between any two lines of the optimizer layer."""

import sys
from pathlib import Path

import torch

import sam_fused

# An interrupt may come between any two lines. The line where it comes is chosen by a trace function.

_PACKAGE = Path(sam_fused.__file__).parent
_TRACED = tuple(str(path) for path in ((_PACKAGE / "optim"), (_PACKAGE / "ops" / "prepared.py")))


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the optimizer layer or the prepared sets."""

    def __init__(self, number):
        self.number, self.count, self.where = number, 0, None

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(_TRACED):
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


def interrupted_everywhere(prepare):
    """For every line n: ``prepare()`` gives the action to interrupt and a check that takes the place of the interrupt."""
    number, problems = 0, []
    while True:
        number += 1
        action, check = prepare()
        interrupt = Interrupt(number)
        if not interrupt.during(action):
            assert number > 20
            break
        problem = check()
        if problem:
            problems.append(f"{interrupt.where}: {problem}")
    assert not problems, sorted(set(problems))
