"""In which form a matrix W (m, n) of rank r is stored: the tensors of every form, and how many numbers they are.

A form is what a matrix has; a storage is what was asked for all of them.
"""

from typing import Any

from welore.errors import choose

DENSE, FACTORED, PIVOTED = "dense", "factored", "pivoted"
FORMS = {FACTORED: ("A.weight", "B.weight"), PIVOTED: ("P.weight", "C.weight", "order")}
ORDER_BYTES = 4  # per row: `order` is int32
STORAGES = {FACTORED: "A (m, r) and B (r, n)", PIVOTED: "P (r, n) and C (m - r, r)", "auto": "the smaller of the two"}


def cost(m: int, n: int, r: Any, form: str) -> Any:
    """Numbers that W (m, n) of rank r takes: m n, r (m + n) or r (m + n - r). r: an int, or an array of ranks.

    The order of a pivoted matrix is integers, not numbers: it counts in bytes alone.
    """
    return {DENSE: m * n + 0 * r, FACTORED: r * (m + n), PIVOTED: r * (m + n - r)}[form]


def shapes(m: int, n: int, r: int, form: str) -> dict[str, tuple[int, ...]]:
    """Name inside the layer -> shape of what stands for W (m, n) of rank r."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {
        FACTORED: ((m, r), (r, n)),
        PIVOTED: ((r, n), (m - r, r), (m,)),
    }
    return dict(zip(FORMS[form], found[form], strict=True))


def form_of(m: int, n: int, r: int, storage: str) -> str:
    """The form that a matrix of rank r < min(m, n) gets; WeLoreError for an unknown storage."""
    choose("storage", storage, STORAGES)
    if storage != "auto":
        return storage
    return PIVOTED if pivoting_pays(m, n, r) else FACTORED


def pivoting_pays(m: int, n: int, r: Any) -> Any:
    """Whether the pivoted form takes fewer bytes where a number takes two, its order included. r: as in `cost`.

    It does but for the smallest ranks.
    """
    return 2 * (cost(m, n, r, FACTORED) - cost(m, n, r, PIVOTED)) > ORDER_BYTES * m
