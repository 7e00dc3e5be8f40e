"""What ours costs at least: its operations at the speed of a matrix product. For speed.py and scale.py."""

import time

import numpy as np
import torch


def operations(shape: tuple[int, int], rank: int | None = None) -> tuple[float, float]:
    """Of one matrix, in float64 and in float32.

    In float64 half a Gram product (symmetric) and 4/3 k^3 for its reduction; in float32, if there are factors of a
    rank, the vectors, the back transform and the projection.
    """
    k, long = min(shape), max(shape)
    double = k * k * long + 4 / 3 * k**3
    return double, 0.0 if rank is None else 4 / 3 * k**3 + 2 * k * k * rank + 2 * k * long * rank


def speeds(k: int = 1024) -> tuple[float, float]:
    """Operations per second of a product in float64 and in float32, one thread: torch's or numpy's, if that is faster.

    The two come with libraries of their own, and each is the faster one on some processor.
    """
    return _speed(k, torch.float64), _speed(k, torch.float32)


def _speed(k: int, dtype: torch.dtype) -> float:
    X = torch.randn(k, k, dtype=dtype)
    same: np.ndarray = X.numpy()
    seconds = []
    for _ in range(7):
        for matrix in (X, same):
            started = time.process_time()
            matrix @ matrix
            seconds.append(time.process_time() - started)
    return 2 * k**3 / min(seconds)
