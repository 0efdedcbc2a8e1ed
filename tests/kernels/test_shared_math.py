"""The arithmetic that CPU and GPU share, compiled by nvcc: the PTX has the multiply-adds that are written and no others.

`tests/csrc/test_element.py` checks what the same file computes when g++ compiles it. A compiler that contracts a product and a
sum, or takes an approximate root, would give other bits; here its instructions are counted.
"""

import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

# fma, mul and add (or sub) in each function, as element.h writes them. A negation is none of them.
WRITTEN = {
    "perturbed": (1, 0, 0),
    "perturbed_adaptive": (1, 2, 0),
    "accumulated": (1, 0, 0),
    "sgd_direction": (1, 1, 0),
    "sgd_momentum": (1, 1, 0),
    "sgd_weight": (2, 0, 0),
    "adam_direction": (1, 1, 0),
    # decay, beta2 v, (1 - beta2) g, step_size m; g - m, + eps, w + step
    "adam": (2, 4, 3),
}
ONLY_FP64 = {
    "product": (1, 3, 5),
    "perturbation": (0, 1, 1),
    # Two branches that scale once and square, one that squares; each adds.
    "add_square": (0, 5, 3),
}


def compiled(nvcc, folder, *flags):
    target = folder / f"shared_math{''.join(flags)}.ptx"
    command = [nvcc, "-std=c++20", "-O3", *flags, f"-I{CSRC}", "-arch=compute_90", "-ptx", "-o", str(target)]
    subprocess.run([*command, str(HERE / "shared_math.cu")], check=True)
    bodies = re.findall(r"\.entry (\w+)\((.*?)\n\}", target.read_text(), flags=re.S)
    return dict(bodies)


@pytest.fixture(scope="module")
def ptx(nvcc, tmp_path_factory):
    """As the build compiles it."""
    from build_cuda import ARITHMETIC_FLAGS

    return compiled(nvcc, tmp_path_factory.mktemp("ptx"), *ARITHMETIC_FLAGS)


def counts(body, suffix):
    def count(pattern):
        return len(re.findall(pattern, body))

    # Products and sums carry a rounding mode only where the compiler may not merge them into one fma.
    return (
        count(rf"\bfma\.rn\.{suffix}\b"),
        count(rf"\bmul(?:\.rn)?\.{suffix}\b"),
        count(rf"\b(?:add|sub)(?:\.rn)?\.{suffix}\b"),
    )


@pytest.mark.parametrize("suffix", ["f32", "f64"])
@pytest.mark.parametrize("function", WRITTEN)
def test_as_many_multiply_adds_as_are_written(function, suffix, ptx):
    assert counts(ptx[f"{function}_{suffix}"], suffix) == WRITTEN[function]


@pytest.mark.parametrize("function", ONLY_FP64)
def test_as_many_in_what_is_fp64_alone(function, ptx):
    assert counts(ptx[f"{function}_f64"], "f64") == ONLY_FP64[function]


def test_roots_and_quotients_are_correctly_rounded(ptx):
    for suffix in ("f32", "f64"):
        body = ptx[f"adam_{suffix}"]
        assert len(re.findall(rf"sqrt\.rn\.{suffix}", body)) == 1 and len(re.findall(rf"div\.rn\.{suffix}", body)) == 2
    everything = "".join(ptx.values())
    assert "approx" not in everything and ".ftz" not in everything and "div.full" not in everything


def test_halves_are_converted_by_one_instruction(ptx):
    assert "cvt.f32.f16" in ptx["from_float16"]
    assert "cvt.rn.f16.f32" in ptx["to_float16"] and "cvt.rn.bf16.f32" in ptx["to_bfloat16"]


def test_this_would_be_seen_if_the_compiler_contracted(nvcc, tmp_path):
    """Without the build's flag nvcc merges products and sums: the counts above are not what they would be anyway."""
    contracted = compiled(nvcc, tmp_path)
    differ = {name for name, wanted in WRITTEN.items() if counts(contracted[f"{name}_f32"], "f32") != wanted}
    assert "adam" in differ
