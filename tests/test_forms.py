import numpy as np
import pytest

from welore.errors import WeLoreError
from welore.layers.registry import DENSE, FACTORED, FORMS, PIVOTED, cost, form_of, shapes


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (9, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_cost_is_the_count_of_the_numbers_in_the_tensors(m: int, n: int, form: str) -> None:
    for r in range(1, min(m, n) + 1):
        found = shapes(m, n, r, form)
        assert tuple(found) == FORMS[form]
        assert cost(m, n, r, form) == sum(np.prod(shape) for name, shape in found.items() if name != "order")


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (9, 1)])
def test_pivoted_is_smaller_than_dense_below_full_rank_and_than_factored_always(m: int, n: int) -> None:
    r = np.arange(1, min(m, n) + 1)
    pivoted = cost(m, n, r, PIVOTED)
    assert (pivoted[:-1] < cost(m, n, r, DENSE)[:-1]).all()
    assert pivoted[-1] == m * n
    assert (pivoted < cost(m, n, r, FACTORED)).all()


def test_auto_takes_the_fewer_bytes_with_the_order_counted() -> None:
    for m, n in ((40, 30), (30, 40)):
        for r in range(1, 30):
            factored, pivoted = 2 * r * (m + n), 2 * r * (m + n - r) + 4 * m
            assert form_of(m, n, r, "auto") == (PIVOTED if pivoted < factored else FACTORED)
    assert {form_of(40, 30, r, "auto") for r in range(1, 30)} == {FACTORED, PIVOTED}


def test_unknown_storage_names_the_known_ones() -> None:
    with pytest.raises(WeLoreError, match="unknown storage 'pivotted'; did you mean 'pivoted'"):
        form_of(7, 5, 3, "pivotted")
