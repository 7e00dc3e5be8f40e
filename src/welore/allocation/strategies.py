"""How singular values of different matrices are compared: a strategy gives every one of them a score.

Functions of arrays: sigma (k,) descending of every matrix in, scores (k,) not ascending out.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from welore.allocation.rule import Rule
from welore.allocation.spectra import RELATIVE, Spectra, block_of
from welore.config import BREAK_EVEN, MinRatio
from welore.errors import WeLoreError
from welore.linalg.spectrum import Values, normalise

OWL_SPREAD = 0.08  # lambda of OWL: how far the ratio of a block may lie from the mean

Scores = list[Values]


@dataclass(frozen=True)
class Strategy:
    """A function that scores singular values, and the default of `min_ratio` that belongs to it."""

    scores: Callable[[Spectra, Rule], Scores]
    min_ratio: MinRatio


def welore(spectra: Spectra, rule: Rule) -> Scores:
    """The normalised spectrum s itself: the level is the paper's one threshold t, rank r = #{s >= t}. WeLore 4.1."""
    return [normalise(sigma) for sigma in spectra.values.values()]


def uniform(spectra: Spectra, rule: Rule) -> Scores:
    """The position in the spectrum, so that a level f removes the same fraction f of every matrix."""
    return [_positions(len(sigma)) for sigma in spectra.values.values()]


def owl(spectra: Spectra, rule: Rule) -> Scores:
    """Uniform inside a block; blocks with more outliers keep more. OWL, arXiv 2310.05175, section 3.

    Here an outlier is counted against the mean of its matrix, there of its block.
    """
    if not spectra.outliers:
        raise WeLoreError("strategy owl needs outliers, which are counted from statistics: give --statistics")
    blocks: dict[str, list[tuple[float, int]]] = {}
    for name, (m, n) in spectra.shapes.items():
        blocks.setdefault(block_of(name), []).append((spectra.outliers[name], m * n))
    share = {
        block: sum(x * size for x, size in pairs) / sum(size for _, size in pairs) for block, pairs in blocks.items()
    }
    mean = sum(share.values()) / len(share)
    widest = max(abs(x - mean) for x in share.values()) or 1.0
    extra = {block: OWL_SPREAD * (x - mean) / widest for block, x in share.items()}
    return [_positions(len(sigma)) + extra[block_of(name)] for name, sigma in spectra.values.items()]


def energy(spectra: Spectra, rule: Rule) -> Scores:
    """The share of the squared norm that is lost with this value and all smaller ones: the same for every matrix."""
    return [_tails(sigma**2)[:-1] / (float((sigma**2).sum()) or 1.0) for sigma in spectra.values.values()]


def waterfill(spectra: Spectra, rule: Rule) -> Scores:
    """The loss avoided per stored number, so that one price for all matrices minimises the sum of losses.

    The loss at rank r is the sum over the removed values: measured losses if there are any, else squares; in relative
    units, as a share of the squared norm. The score is the slope of the lower convex hull of loss over numbers stored,
    with the overhead of each form.
    """
    scores = []
    for name, sigma in spectra.values.items():
        loss = spectra.losses.get(name, sigma**2)
        if spectra.unit == RELATIVE:
            loss = loss / (float(loss.sum()) or 1.0)
        scores.append(_slopes(_tails(loss), rule.counted(np.arange(1, len(loss) + 1), spectra.shapes[name])))
    return scores


STRATEGIES = {
    "welore": Strategy(welore, min_ratio=0.5),
    "uniform": Strategy(uniform, min_ratio=0.0),
    "owl": Strategy(owl, min_ratio=0.0),
    "energy": Strategy(energy, min_ratio=0.0),
    "waterfill": Strategy(waterfill, min_ratio=BREAK_EVEN),
}


def _positions(k: int) -> Values:
    return (np.arange(k, 0, -1) - 0.5) / k


def _tails(squares: Values) -> Values:
    """(k + 1,): the sum of the removed squares at rank 0 .. k."""
    return np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])


def _slopes(loss: Values, numbers: NDArray[np.int64]) -> Values:
    """Score (k,) of every value: the slope of the lower hull of (numbers, loss) over the step that ends at its rank.

    loss: (k + 1,), at rank 0 .. k; numbers: (k,), at rank 1 .. k, the last being dense. Rank 1 is the least, so the
    first value is worth as much as the second. Ranks that store no less than the dense matrix are no corners.
    """
    k = len(numbers)
    corners: list[int] = []
    for r in [*np.flatnonzero(numbers[:-1] < numbers[-1]).tolist(), k - 1]:  # index r: rank r + 1
        while len(corners) > 1 and _steeper(loss[1:], numbers, corners[-2], corners[-1], r):
            corners.pop()
        corners.append(r)
    scores = np.zeros(k)
    for before, after in itertools.pairwise(corners):
        scores[before + 1 : after + 1] = (loss[before + 1] - loss[after + 1]) / float(numbers[after] - numbers[before])
    scores[0] = scores[min(1, k - 1)]
    return np.minimum.accumulate(scores)  # rounding must not turn the order round


def _steeper(loss: Values, numbers: NDArray[np.int64], a: int, b: int, c: int) -> bool:
    """Whether the way from b to c falls as steeply as that from a to b: then b is no corner."""
    first = (loss[a] - loss[b]) * float(numbers[c] - numbers[b])
    return bool((loss[b] - loss[c]) * float(numbers[b] - numbers[a]) >= first)
