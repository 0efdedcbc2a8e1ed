"""What optimizers do with scalars and with sums that were rounded: a few lines each, on whatever device they are."""

import math

import pytest
import torch

from sam_fused.ops.functional import clip_factor, count_not_finite_, unrounded_, weighted_mean

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_weighted_mean_is_rounded_once(dtype, shape):
    """Three thirds of 1 + 2^-7 in bf16: added up in halves they are another number."""
    values = [torch.full(shape, 1.0078125, dtype=dtype) for _ in range(3)]
    mean = weighted_mean(values, [1 / 3] * 3)
    assert mean.shape == () and mean.dtype == dtype and mean.item() == 1.0078125
    uneven = [torch.full(shape, value, dtype=dtype) for value in (1.0, 2.0, 8.0)]
    assert weighted_mean(uneven, [3 / 8, 3 / 8, 2 / 8]).item() == 3.125
    single = torch.full(shape, 3.0, dtype=dtype, requires_grad=True)
    assert weighted_mean([single], [1.0]).item() == 3.0 and not weighted_mean([single], [1.0]).requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_weighted_mean_of_whole_numbers_is_none(device):
    """A closure may return a count."""
    mean = weighted_mean([torch.tensor(value, device=device) for value in (1, 2)], [0.5, 0.5])
    assert mean.dtype == torch.float32 and (device == "meta" or mean.item() == 1.5)


def test_a_weighted_mean_of_scalars_elsewhere_stays_there(monkeypatch):
    """No value is asked for: with the CPU's branch closed, the other one's results are the same."""

    class Elsewhere(torch.Tensor):
        is_cpu = False

        def item(self):
            raise AssertionError("waited for")

    values = [torch.tensor(value).as_subclass(Elsewhere) for value in (1.0, 2.0, 8.0, 4.0)]
    assert float(weighted_mean(values, [3 / 10, 3 / 10, 2 / 10, 2 / 10]).as_subclass(torch.Tensor)) == pytest.approx(3.3)
    assert float(weighted_mean(values[:2], [0.5, 0.5]).as_subclass(torch.Tensor)) == 1.5
    there = weighted_mean([torch.empty(1, device="meta", dtype=torch.bfloat16)] * 3, [0.5, 0.25, 0.25])
    assert there.device.type == "meta" and there.shape == () and there.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_a_rounding_becomes_the_sum_again(dtype):
    exact = torch.tensor([1.0001, -2.0003, math.nan, math.inf, 0.3, 5.0, -0.0])
    rounded = exact.to(dtype)
    assert not torch.equal(rounded.float()[:2], exact[:2])
    rounded[4] = 0.25  # somebody has clipped this one,
    rounded[5] = math.nan  # and spoilt that one
    wanted = exact.clone()
    wanted[4], wanted[5] = 0.25, math.nan
    result = unrounded_(rounded, exact)
    assert result is exact or result.data_ptr() == exact.data_ptr()
    assert torch.equal(result.nan_to_num(7.0), wanted.nan_to_num(7.0)) and torch.equal(result.isnan(), wanted.isnan())
    assert math.copysign(1.0, result[6]) == -1.0


def test_norms_that_are_not_finite_are_counted():
    count = torch.zeros((), dtype=torch.int64)
    for norm in (1.0, math.inf, 0.0, math.nan):
        count_not_finite_(torch.tensor(norm), count)
    assert count.item() == 2 and count.dtype == torch.int64


@pytest.mark.parametrize("limit", [2.0, torch.tensor(2.0), torch.tensor([2.0], dtype=torch.float64, requires_grad=True)])
def test_a_clip_factor_is_a_scalar(limit):
    """A limit of shape [1] would broadcast its shape into every gradient it meets."""
    for norm, wanted in ((4.0, 2.0 / 4.000001), (1.0, 1.0)):
        factor = clip_factor(torch.tensor(norm), limit)
        assert factor.shape == () and not factor.requires_grad and factor.item() == pytest.approx(wanted, rel=1e-6)
