"""The few LAPACK routines behind the decompositions, for one bar: they take a sixth of the time of two torch.svd.

benchmarks/speed.py measures it. torch.linalg.eigh of the same float64 Gram matrices takes 1.4 times as long, with its
vectors kept instead of the reflectors, which is below the bar; it does the work on a GPU (linalg/svd.py).

scipy's own wrappers hold the lock, so threads would wait for each other; the same routines, reached through the
function pointers that scipy publishes for Cython and Numba (scipy.linalg.cython_lapack, cython_blas), do not. Their
signatures are checked: a scipy with 64-bit integers would read beyond ours.
Matrices are Fortran-ordered; `lower` triangles are used and stored.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack

Matrix = NDArray[Any]
LETTER = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}


def add_gram(gram: Matrix, rows: Matrix) -> None:
    """gram (k, k) += rows^T rows, lower triangle only. rows: (b, k), C-ordered."""
    b, k = rows.shape
    # rows^T in Fortran order is the memory of rows: (k, b), leading dimension k.
    _call(cython_blas, "syrk", gram.dtype, b"L", b"N", k, b, 1.0, rows, k, 1.0, gram, k)


def tridiagonalise(gram: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Diagonal (k,), off-diagonal (k-1,), tau (k-1,) of Q^T G Q; the reflectors of Q overwrite `gram` (sytrd)."""
    k, kind = len(gram), gram.dtype
    diagonal, off, tau = np.empty(k, kind), np.empty(max(k - 1, 0), kind), np.empty(max(k - 1, 0), kind)
    size = np.empty(1, kind)
    _checked("sytrd", kind, b"L", k, gram, k, diagonal, off, tau, size, -1)
    work = np.empty(int(size[0]), kind)
    _checked("sytrd", kind, b"L", k, gram, k, diagonal, off, tau, work, len(work))
    return diagonal, off, tau


def tridiagonal_values(diagonal: Matrix, off: Matrix) -> Matrix:
    """Eigenvalues (k,), ascending, by the root-free QR iteration (sterf)."""
    values, rest = diagonal.copy(), off.copy()
    _checked("sterf", values.dtype, len(values), values, rest)
    return values


def tridiagonal_vectors(diagonal: Matrix, off: Matrix) -> Matrix:
    """Eigenvectors (k, k) in columns, eigenvalues ascending, by divide and conquer (stevd)."""
    k, kind = len(diagonal), diagonal.dtype
    values, rest, vectors = diagonal.copy(), off.copy(), np.empty((k, k), kind, order="F")
    work, iwork = np.empty(1 + 4 * k + k * k, kind), np.empty(3 + 5 * k, np.int32)
    _checked("stevd", kind, b"V", k, values, rest, vectors, k, work, len(work), iwork, len(iwork))
    return vectors


def back_transform(reflectors: Matrix, tau: Matrix, vectors: Matrix) -> None:
    """vectors (k, r) <- Q vectors, in place. reflectors: (k, k) as `tridiagonalise` left them (ormtr)."""
    (k, r), kind = vectors.shape, vectors.dtype
    # ormtr's own answer to a workspace query is too small for the blocked code that it calls, 3 times slower.
    work = np.empty(64 * r + 65 * 64, kind)
    _checked("ormtr", kind, b"L", b"L", b"N", k, r, reflectors, k, tau, vectors, k, work, len(work))


def cholesky(weight: Matrix) -> bool:
    """Overwrite the upper triangle of `weight` (k, k) with L^T, weight = L L^T; whether there is such an L (potrf)."""
    info = np.zeros(1, np.int32)
    _call(cython_lapack, "potrf", weight.dtype, b"U", len(weight), weight, len(weight), info)
    return bool(info[0] == 0)


def invert(triangle: Matrix) -> None:
    """Overwrite L^T, the upper triangle that `cholesky` left, with that of (L L^T)^-1 (potri)."""
    _checked("potri", triangle.dtype, b"U", len(triangle), triangle, len(triangle))


def times_triangle(triangle: Matrix, X: Matrix, *, side: bytes, transposed: bytes) -> None:
    """X (a, b) <- T X on side b"L", X T on b"R"; T^T if transposed is b"T" (trmm). triangle: upper, Fortran order."""
    _triangular("trmm", triangle, X, side, transposed)


def solve_triangle(triangle: Matrix, X: Matrix) -> None:
    """X (a, b) <- T^-1 X (trsm). triangle: upper (a, a), Fortran order; its lower part is not looked at."""
    _triangular("trsm", triangle, X, b"L", b"N")


def _triangular(name: str, triangle: Matrix, X: Matrix, side: bytes, transposed: bytes) -> None:
    size = (*X.shape, 1.0, triangle, len(triangle), X, len(X))
    _call(cython_blas, name, X.dtype, side, b"U", transposed, b"N", *size)


def pivoted_qr(matrix: Matrix) -> NDArray[np.int64]:
    """Order (m,) of the columns of `matrix` (r, m) in QR with column pivoting, each the longest that is left (geqp3).

    The triangle R (r, m), columns in that order, overwrites the upper part of `matrix`.
    """
    (r, m), kind = matrix.shape, matrix.dtype
    order, tau, size = np.zeros(m, np.int32), np.empty(min(r, m), kind), np.empty(1, kind)
    _checked("geqp3", kind, r, m, matrix, r, order, tau, size, -1)
    work = np.empty(int(size[0]), kind)
    _checked("geqp3", kind, r, m, matrix, r, order, tau, work, len(work))
    return order.astype(np.int64) - 1


def _checked(name: str, kind: np.dtype[Any], *arguments: Any) -> None:
    info = np.zeros(1, np.int32)
    _call(cython_lapack, name, kind, *arguments, info)
    if info[0] != 0:
        raise ArithmeticError(f"LAPACK {LETTER[kind]}{name} failed (info {info[0]})")


def _call(library: Any, name: str, kind: np.dtype[Any], *arguments: Any) -> None:
    """Call a Fortran routine: everything goes by address; arrays must already have the right type and order."""
    assert all(a.dtype in (kind, np.int32) for a in arguments if isinstance(a, np.ndarray))
    held: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            held.append(argument.ctypes.data_as(ctypes.c_void_p))
        elif isinstance(argument, bytes):
            held.append(ctypes.c_char_p(argument))
        elif isinstance(argument, float):
            held.append(ctypes.byref((ctypes.c_float if kind == np.float32 else ctypes.c_double)(argument)))
        else:
            held.append(ctypes.byref(ctypes.c_int(argument)))
    _routine(library, LETTER[kind] + name)(*held)


@cache
def _routine(library: Any, name: str) -> Any:
    capsule = library.__pyx_capi__[name]
    if "int *" not in str(capsule):  # its text holds the signature
        raise ImportError(f"scipy's {name} does not take 32-bit integers: install another build of scipy")
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    label = ctypes.pythonapi.PyCapsule_GetName
    label.restype, label.argtypes = ctypes.c_char_p, [ctypes.py_object]
    # CFUNCTYPE, unlike PYFUNCTYPE, gives the lock back while the routine runs.
    return ctypes.CFUNCTYPE(None)(pointer(capsule, label(capsule)))
