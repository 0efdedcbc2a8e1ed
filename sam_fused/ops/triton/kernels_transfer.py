# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type"
"""The smallest kernel: words that travel as arguments. It also shows whether launches work."""

from __future__ import annotations

import triton
import triton.language as tl

# Halves travel doubled, and with this added: an odd number that needs 64 bits, whatever the half. Triton compiles anew for
# numbers of another width, and for those that are 1 or multiples of 16.
BIAS = tl.constexpr((1 << 40) + 1)


@triton.jit(do_not_specialize=["to", "halves"])
def write_words(to, halves):
    """``to[i]``: the high and the low 32 bits in ``halves[2 i]`` and ``halves[2 i + 1]``."""
    for i in tl.static_range(len(halves) // 2):
        tl.store(to + i, (((halves[2 * i] - BIAS) >> 1) << 32) | ((halves[2 * i + 1] - BIAS) >> 1))
