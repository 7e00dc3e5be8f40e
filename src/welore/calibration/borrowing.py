"""The moments of single experts, each of which borrows a few tokens from the average of its layer."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from welore.layers.experts import DOWN

if TYPE_CHECKING:
    from welore.calibration.hooks import Moments


class Pool:
    """The average over the experts of one layer: `add` the sums of every expert, then `lend` to every expert.

    Both can be done for some of them at a time. docs/concepts/statistics.md tells the rule.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Tensor] = {}  # of a layer of the experts and a kind
        self._tokens: dict[tuple[str, str], int] = defaultdict(int)
        self._directions: dict[tuple[str, str], float] = defaultdict(float)  # times the tokens
        self._reached: dict[str, tuple[str, torch.dtype]] = {}  # layer -> the one that has its inputs, and its dtype

    def add(self, moments: "Moments", experts: str = "") -> None:
        """Add the sums of those layers whose name begins with `experts`."""
        for name, count in moments.counts.items():
            layer = name.rpartition(".")[2]
            if not count or not name.startswith(experts):
                continue
            self._reached.setdefault(layer, (moments.owner[name].rpartition(".")[2], moments.dtypes[name]))
            for kind in ("inputs", "magnitudes", "outputs"):
                total, key = moments.sums.get((name, kind)), (layer, kind)
                if total is None:
                    continue
                self._totals.setdefault(key, torch.zeros_like(total)).add_(total)
                self._tokens[key] += count
                if kind != "magnitudes":
                    self._directions[key] += count * _directions(total)

    def lend(self, moments: "Moments", experts: str = "") -> None:
        """Make the sums of those layers those of a few tokens more; layers that no token reached get the average."""
        for name in moments.counts:
            layer = name.rpartition(".")[2]
            if layer not in self._reached or not name.startswith(experts):
                continue
            if name not in moments.owner:
                owner, moments.dtypes[name] = self._reached[layer]
                own = f"{name.rpartition('.')[0]}.{owner}"
                moments.owner[name] = own if own in moments.counts else name
            if moments.owner[name] == name:
                self._lend(moments, name, "inputs", apart=layer == DOWN)
                self._lend(moments, name, "magnitudes", apart=layer == DOWN)
            self._lend(moments, name, "outputs", apart=layer != DOWN)

    def _lend(self, moments: "Moments", name: str, kind: str, *, apart: bool) -> None:
        """Add to a sum that of as many tokens of the average as a moment has directions.

        A moment is then known as well as it differs: Gaussian numbers leave an error of tr(M)^2 / (count |M|^2).
        apart: the experts' own neurons, which have nothing in common but their size.
        """
        layer, count, own = name.rpartition(".")[2], moments.counts[name], moments.sums.get((name, kind))
        average = self._average(layer, kind, apart=apart)
        if average is None:
            return
        if own is None:  # as if one token had reached it: no expert is without any use
            moments.sums[name, kind] = average
            return
        key = layer, "outputs" if kind == "outputs" else "inputs"
        more = self._directions[key] / self._tokens[key]
        own.add_(average, alpha=more).mul_(count / (count + more))

    def _average(self, layer: str, kind: str, *, apart: bool) -> Tensor | None:
        """The average over the tokens, of its own memory; None if there is none."""
        if (layer, kind) not in self._totals:
            return None
        average = self._totals[layer, kind] / self._tokens[layer, kind]
        if apart and average.ndim > 1:
            return torch.diag_embed(average.diagonal().mean().expand(len(average)))
        return average.mean().expand_as(average).clone() if apart else average


def _directions(total: Tensor) -> float:
    """How many directions a moment has, tr^2 / |.|^2, and one more; total: its upper triangle."""
    norm = 2 * total.triu(1).square().sum() + total.diagonal().square().sum()
    return 1 + float(total.diagonal().sum().square() / norm.clamp(min=torch.finfo(total.dtype).tiny))
