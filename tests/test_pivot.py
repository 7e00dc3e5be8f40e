import numpy as np
import pytest
import torch
from torch import Tensor

from welore.errors import WeLoreError
from welore.layers.storage_forms import FORMS, PIVOTED
from welore.linalg.interpolative import LARGEST, Pivoted, pivoted

SHAPES = [(7, 5, 3), (5, 7, 3), (9, 4, 1), (9, 4, 4), (4, 9, 3), (6, 6, 5), (40, 30, 25)]
ALL_ROWS = [(4, 9, 4), (6, 6, 6), (1, 5, 1)]  # r = m


def factors(m: int, n: int, r: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(m, r, dtype=dtype), torch.randn(r, n, dtype=dtype)


def whole(found: Pivoted) -> Tensor:
    return torch.cat((found.P, found.C @ found.P))[found.order]


@pytest.mark.parametrize("shape", [*SHAPES, *ALL_ROWS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_nothing_is_lost(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    m, n, r = shape
    A, B = factors(*shape, dtype)
    found = pivoted(A, B)
    assert found.P.dtype == found.C.dtype == dtype
    assert (found.P.shape, found.C.shape, found.order.shape) == ((r, n), (m - r, r), (m,))
    W = A.double() @ B.double()
    assert torch.linalg.norm(whole(found).double() - W) <= tolerance * torch.linalg.norm(W)
    torch.testing.assert_close(W[torch.argsort(found.order)[:r]], found.P.double(), rtol=tolerance, atol=tolerance)
    assert torch.equal(found.order.sort().values, torch.arange(m))


@pytest.mark.parametrize("shape", [*SHAPES, (200, 90, 60)])
def test_no_combination_has_a_large_coefficient(shape: tuple[int, int, int]) -> None:
    for seed in range(5):
        A, B = factors(*shape, seed=seed)
        assert pivoted(A, B).C.abs().max() <= LARGEST
        steep = A * torch.logspace(0, -9, shape[2], dtype=A.dtype)
        assert pivoted(steep, B).C.abs().max() <= LARGEST


def test_matrix_on_which_pivoted_qr_alone_has_exponential_coefficients() -> None:
    """Kahan's matrix; QR keeps its order, for every column that is left is equally long (a trace decides the ties)."""
    r, angle = 24, 1.2
    kahan = np.diag(np.sin(angle) ** np.arange(r)) @ (np.eye(r) - np.cos(angle) * np.triu(np.ones((r, r)), 1))
    kahan[:, :-1] *= 1 + 1e-9 * np.arange(r - 1, 0, -1)
    A = torch.from_numpy(kahan.T.copy())
    A = torch.cat((A[:-1, :-1], A[-1:, :-1]))  # (24, 23): the last row is to be expressed by the others
    naive = torch.linalg.solve(A[:-1].T, A[-1])
    assert naive.abs().max() > 10
    found = pivoted(A, torch.eye(r - 1, dtype=A.dtype))
    assert found.C.abs().max() <= LARGEST
    torch.testing.assert_close(whole(found), A, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_factors_of_lower_rank_than_they_have_columns(scale: float) -> None:
    A, B = factors(30, 20, 9)
    A = scale * A[:, :4] @ torch.randn(4, 9, dtype=A.dtype)
    found = pivoted(A, B)
    torch.testing.assert_close(whole(found) / scale, A @ B / scale, rtol=1e-10, atol=1e-10)
    assert found.C.abs().max() <= LARGEST
    assert int((found.C.abs().sum(0) > 0).sum()) == 4


def test_zero_matrix_and_equal_rows() -> None:
    A, B = factors(8, 5, 3)
    zero = pivoted(0 * A, B)
    assert not whole(zero).any()
    assert not zero.C.any()
    equal = pivoted(A[:1].expand(8, 3), B)
    torch.testing.assert_close(whole(equal), (A[:1] @ B).expand(8, 5))


def test_bits_do_not_depend_on_how_the_factors_lie_in_memory() -> None:
    A, B = factors(40, 30, 11, torch.float32)
    one = pivoted(A, B)
    other = pivoted(A.T.contiguous().T, torch.stack((B, B), -1)[..., 0])
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("P", "C", "order"))


def test_rounding_to_bfloat16_stays_within_its_bound() -> None:
    """|W - W_rounded| <= (2 u + u^2) |C| |P| for the other rows, u |P| for the pivots; u = 2^-8."""
    A, B = factors(60, 40, 25)
    found = pivoted(A, B)
    rounded = Pivoted(found.P.bfloat16().double(), found.C.bfloat16().double(), found.order)
    u = 2.0**-8
    P, C = found.P.abs(), found.C.abs()
    bound = torch.cat((u * P, (2 * u + u * u) * C @ P))[found.order]
    assert ((whole(rounded) - whole(found)).abs() <= bound + 1e-12).all()


def test_factors_that_do_not_belong_together_are_refused() -> None:
    A, B = factors(7, 5, 3)
    with pytest.raises(WeLoreError, match="are no A \\(m, r\\), B \\(r, n\\)"):
        pivoted(A, B[:2])
    with pytest.raises(WeLoreError, match="r <= m"):
        pivoted(A[:2], B)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_every_form_give_the_product_back(shape: tuple[int, int, int], form: str) -> None:
    A, B = factors(*shape, torch.float32)
    parts = FORMS[form].pack(A, B)
    assert {name: tuple(t.shape) for name, t in parts.items()} == FORMS[form].shapes(*shape)
    torch.testing.assert_close(FORMS[form].unpack(parts), A @ B, rtol=1e-5, atol=1e-5)
    assert form != PIVOTED or parts["order"].dtype == torch.int64
