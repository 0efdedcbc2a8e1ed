"""Training runs in every form of a step, with or without a loss scale, to be held against each other."""

import torch
from torch.nn.functional import mse_loss

from sam_fused import SAM, MicroBatchSAM
from tests.devices import default
from tests.optim.helpers import Regression, assert_same_bits, assert_same_state, snapshot, snapshot_state

WHOLE_BATCH = ("closure", "perturbed", "first_second")
MICRO_BATCHES = ("micro_closure", "micro_batch")
ALL = (*WHOLE_BATCH, *MICRO_BATCHES)
BY_HAND = ("perturbed", "first_second", "micro_batch")

# How step(closure, *batch) cuts Regression's 16 samples into three, so that both forms of a micro-batch are the same step.
SIZES = (6, 5, 5)


def pieces(form):
    return SIZES if form in MICRO_BATCHES else (sum(SIZES),)


class Run:
    """A model and the optimizer that trains it in one form. Runs that are made alike are bit-identical.

    ``base`` is a class and its options; ``grouped`` makes parameter groups of a list of parameters; with ``scale`` the passes
    by hand go through a GradScaler.
    """

    def __init__(self, form, base, backend, *, dtype=torch.float32, scale=None, grouped=list, growth_interval=1000, **options):
        self.form = form
        self.case = Regression(dtype)
        base_class, base_options = base
        options = {"rho": 0.2, "backend": backend, **base_options, **options}
        if form in MICRO_BATCHES:
            options["num_micro_batches"] = len(SIZES)
        self.optimizer = (MicroBatchSAM if form in MICRO_BATCHES else SAM)(grouped(self.params), base_class, **options)
        self.amp = None
        if scale is not None:
            self.amp = torch.amp.GradScaler(default().type, init_scale=scale, growth_interval=growth_interval)

    @property
    def params(self):
        return self.case.params

    def state(self):
        """All bits that a step may change."""
        return snapshot(self.params), snapshot_state(self.optimizer)

    def gradients(self):
        return [param.grad for param in self.params]

    def backward(self, x, y, factor=1.0):
        loss = mse_loss(self.case.model(x), y) * factor
        (loss if self.amp is None else self.amp.scale(loss)).backward()
        return loss

    def passes(self, overflowing=(), before_piece=None):
        """All passes by hand, up to the step itself.

        ``overflowing`` holds pairs of a micro-batch's number (0 for a whole batch) and a pass, 1 or 2, whose loss is infinite.
        """
        optimizer = self.optimizer
        batch = zip(self.case.x.split(pieces(self.form)), self.case.y.split(pieces(self.form)), strict=True)
        optimizer.zero_grad()
        for number, (x, y) in enumerate(batch):
            first, second = (float("inf") if (number, which) in overflowing else 1.0 for which in (1, 2))
            if before_piece is not None:
                before_piece(number)
            self.backward(x, y, first)
            if self.form == "first_second":
                optimizer.first_step(zero_grad=True)
                self.backward(x, y, second)
                continue
            micro = self.form == "micro_batch"
            with optimizer.micro_batch(weight=len(x) / sum(SIZES)) if micro else optimizer.perturbed():
                self.backward(x, y, second)

    def finish(self):
        """The step after ``passes``."""
        if self.amp is not None:
            self.amp.step(self.optimizer)
            self.amp.update()
        elif self.form == "first_second":
            self.optimizer.second_step()
        else:
            self.optimizer.step()

    def step(self, overflowing=(), between=None):
        """A whole step in the run's form; ``between`` is called with the run before the last move of a step by hand."""
        if self.form in ("closure", "micro_closure"):
            assert not overflowing and between is None and self.amp is None
            self.optimizer.zero_grad()
            if self.form == "closure":
                self.optimizer.step(lambda: self.backward(self.case.x, self.case.y))
            else:
                self.optimizer.step(self.backward, self.case.x, self.case.y)
            return
        self.passes(overflowing)
        if between is not None:
            between(self)
        self.finish()


def assert_same_runs(actual, expected):
    """Weights, state and groups of two runs, or of what ``Run.state`` gave, bit for bit."""
    (weights, state), (wanted_weights, wanted_state) = (r.state() if isinstance(r, Run) else r for r in (actual, expected))
    assert_same_bits(weights, wanted_weights)
    assert_same_state(state, wanted_state)
