import re

import numpy as np
import pytest
import torch

from idl import checks

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_positive_integers_pass_and_come_back_as_int(value):
    assert type(checks.positive_integer("n", value)) is int
    assert checks.positive_integer("n", value) == value


@pytest.mark.parametrize("value", [0, 0.5, 3e-6, np.float32(0.5), 5])
def test_non_negative_numbers_pass_and_come_back_as_float(value):
    assert type(checks.non_negative("tol", value)) is float
    assert checks.non_negative("tol", value) == value


@pytest.mark.parametrize("value", [1e-9, 0.5, 0.999999, np.float64(0.25)])
def test_numbers_between_0_and_1_pass(value):
    assert checks.in_open_unit("kappa", value) == value
    assert checks.in_half_open_unit("damping", value) == value


def test_one_is_in_the_half_open_interval_only():
    assert checks.in_half_open_unit("damping", 1) == 1.0
    with pytest.raises(ValueError, match=r"`kappa` must lie strictly between 0 and 1; got 1\."):
        checks.in_open_unit("kappa", 1)


def test_a_choice_that_is_offered_passes():
    assert checks.one_of("on_failure", "warn", ("raise", "warn")) == "warn"


REFUSED = [
    (checks.positive_integer, 0, ValueError, "`x` must be an integer >= 1; got 0."),
    (checks.positive_integer, -3, ValueError, "`x` must be an integer >= 1; got -3."),
    (checks.positive_integer, 2.0, TypeError, "`x` must be an integer >= 1; got 2.0 of type float."),
    (checks.positive_integer, True, TypeError, "`x` must be an integer >= 1; got True of type bool."),
    (checks.positive_integer, "3", TypeError, "`x` must be an integer >= 1; got '3' of type str."),
    (checks.positive_integer, None, TypeError, "`x` must be an integer >= 1; got None of type NoneType."),
    (checks.non_negative, -1e-9, ValueError, "`x` must be finite and >= 0; got -1e-09."),
    (checks.non_negative, NAN, ValueError, "`x` must be finite and >= 0; got nan."),
    (checks.non_negative, INF, ValueError, "`x` must be finite and >= 0; got inf."),
    (checks.non_negative, False, TypeError, "`x` must be a real number >= 0; got False of type bool."),
    (checks.non_negative, "1", TypeError, "`x` must be a real number >= 0; got '1' of type str."),
    (checks.non_negative, 1j, TypeError, "`x` must be a real number >= 0; got 1j of type complex."),
    (checks.in_open_unit, 0, ValueError, "`x` must lie strictly between 0 and 1; got 0."),
    (checks.in_open_unit, NAN, ValueError, "`x` must lie strictly between 0 and 1; got nan."),
    (checks.in_open_unit, "0.5", TypeError, "`x` must be a real number; got '0.5' of type str."),
    (checks.in_open_unit, True, TypeError, "`x` must be a real number; got True of type bool."),
    (checks.in_half_open_unit, 0, ValueError, "`x` must lie in (0, 1]; got 0."),
    (checks.in_half_open_unit, 1.01, ValueError, "`x` must lie in (0, 1]; got 1.01."),
    (checks.in_half_open_unit, NAN, ValueError, "`x` must lie in (0, 1]; got nan."),
    (checks.in_half_open_unit, None, TypeError, "`x` must be a real number; got None of type NoneType."),
    (checks.floating_tensor, [1.0], TypeError, "`x` must be a torch.Tensor; got list. Try torch.as_tensor(x)."),
    (
        checks.floating_tensor,
        torch.ones(1, dtype=torch.int64),
        TypeError,
        "`x` must have a floating-point dtype; got torch.int64. Try x.float().",
    ),
    (
        checks.floating_tensor,
        torch.ones(1, dtype=torch.complex64),
        TypeError,
        "`x` must have a floating-point dtype; got torch.complex64. Try its real and imaginary parts.",
    ),
    (
        checks.dense_tensor,
        torch.eye(2).to_sparse(),
        TypeError,
        "`x` must be a dense tensor; got layout torch.sparse_coo. Try x.to_dense().",
    ),
]


@pytest.mark.parametrize(("check", "value", "kind", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_what_does_not_fit_is_named_with_what_was_expected_and_what_came(check, value, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        check("x", value)


def test_advice_ends_the_message():
    with pytest.raises(ValueError, match=r"got 2\. Choose a smaller one\.$"):
        checks.in_open_unit("kappa", 2, "Choose a smaller one.")


@pytest.mark.parametrize("value", ["Warn", "", None, 3])
def test_a_choice_that_is_not_offered_lists_those_that_are(value):
    with pytest.raises(ValueError, match=rf"^`x` must be one of 'raise', 'warn'; got {value!r}\.$"):
        checks.one_of("x", value, ("raise", "warn"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floating_tensors_pass_as_they_are(dtype):
    value = torch.ones(2, dtype=dtype)
    assert checks.floating_tensor("u", value) is value


def test_tensors_of_one_device_and_dtype_pass():
    checks.same_device_and_dtype({"A": torch.ones(2)})
    checks.same_device_and_dtype({"A": torch.ones(2), "u": torch.zeros(1), "B": torch.ones(0)})


def test_a_tensor_of_another_dtype_is_named_with_the_remedy():
    with pytest.raises(TypeError) as caught:
        checks.same_device_and_dtype({"A": torch.ones(2), "B": torch.ones(1), "u": torch.ones(1, dtype=torch.float64)})
    assert str(caught.value) == (
        "`u` has dtype torch.float64 but `A` has torch.float32. Convert one of them: u.to(torch.float32)."
    )


def test_a_tensor_on_another_device_is_named_with_the_remedy():
    with pytest.raises(ValueError) as caught:
        checks.same_device_and_dtype({"A": torch.ones(2), "u": torch.ones(1, device="meta")})
    assert str(caught.value) == "`u` is on meta but `A` is on cpu. Move one of them: u.to('cpu')."


def test_under_autocast_dtypes_may_differ_and_devices_may_not():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.same_device_and_dtype({"A": torch.ones(2), "u": torch.ones(1, dtype=torch.bfloat16)})
        with pytest.raises(ValueError, match="`u` is on meta"):
            checks.same_device_and_dtype({"A": torch.ones(2), "u": torch.ones(1, device="meta")})
