"""Normalised spectra and the Gaussian null: numpy only.

Shapes: full_rank k = min(m, n); sigma (k,) descending.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def normalise(sigma: Values) -> Values:
    """Min-max normalised spectrum s = (sigma - sigma_min) / (sigma_max - sigma_min), in [0, 1].

    sigma: (k,), descending. A flat spectrum (all values equal, or k = 1) has no small values to prune: all 1.
    WeLore section 4.1.
    """
    spread = sigma[0] - sigma[-1]
    if spread <= 0:
        return np.ones_like(sigma)
    return np.asarray((sigma - sigma[-1]) / spread, dtype=np.float64)


@lru_cache(maxsize=256)
def gaussian_null(m: int, n: int) -> Values:
    """Expected normalised spectrum (k,) of an m x n matrix of independent Gaussian numbers.

    The null model beside which a reduction ratio must be read: such a matrix has no structure, yet min-max
    normalisation "prunes" 22 % of it (square) at threshold 0.175. Quantiles of the Marchenko-Pastur law.
    """
    k, long = min(m, n), max(m, n)
    ratio = k / long
    low, high = 1 - np.sqrt(ratio), 1 + np.sqrt(ratio)
    sigma = np.linspace(low, high, 20_001)
    density = np.sqrt(np.clip((high**2 - sigma**2) * (sigma**2 - low**2), 0, None)) / np.maximum(sigma, 1e-12)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return normalise(np.interp((np.arange(k, 0, -1) - 0.5) / k, mass / mass[-1], sigma))
