"""Second moments of the inputs and of the output gradients of linear layers, summed by hooks while a model runs.

torch only. Products and their sums are float32, whatever the model computes in: 4 bytes for every number of the
statistics while they are gathered.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError
from welore.io.context import finest_dtype
from welore.io.parallel import Processes
from welore.layers.experts import DOWN
from welore.linalg.svd import Factors
from welore.models.targets import Target

PIECES = 4  # of a product x^T x, of which only the upper triangle of pieces is made
MIXED = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8: products of bfloat16 on CUDA give float32
SMALL = 256  # columns up to which it is made in one piece


class Moments:
    """Sums over the tokens that reach the modules; modules: name -> linear layer.

    Run forward and backward, then `end_batch`, as often as there are batches; then `reduce`, then `statistics`.

    experts: names of modules whose children are experts. An expert that few tokens reach borrows from all of its layer.

    Layers that read the same tensor share one sum of inputs: `owner` names the first of them. Whether they do is
    seen in the tensors of every batch, not in names; layers that shared by accident are told apart when they part.
    """

    def __init__(self, modules: Mapping[str, nn.Module], experts: Iterable[str] = ()) -> None:
        self.experts = tuple(experts)
        self.counts = dict.fromkeys(modules, 0)
        self.owner: dict[str, str] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}  # of a layer and a kind
        self._batch: dict[str, list[Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # in which the layers compute
        self._device = next((p.device for module in modules.values() for p in module.parameters()), torch.device("cpu"))
        for name, module in modules.items():
            module.register_forward_hook(partial(self._enters, name), with_kwargs=True)

    def _enters(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = _entering(args, kwargs)
        if not x.numel():
            return
        self._batch.setdefault(name, []).append(x)
        total = self._sum(name, "outputs", y)
        self._dtypes[name] = y.dtype
        if y.requires_grad:
            y.register_hook(lambda g: _add_gram(total, g.reshape(-1, g.shape[-1])))

    def end_batch(self) -> None:
        """Add what entered the modules since the last call."""
        tensors = {name: tuple(map(_identity, inputs)) for name, inputs in self._batch.items()}
        for name, owner in list(self.owner.items()):
            if tensors.get(name) != tensors.get(owner):
                self._part(name)
        new: dict[tuple[Any, ...], str] = {}
        for name, inputs in self._batch.items():
            if name not in self.owner:
                self.owner[name] = new.setdefault(tensors[name], name)
            for x in inputs:
                rows = x.reshape(-1, x.shape[-1]).float()
                self.counts[name] += len(rows)
                if self.owner[name] == name:
                    exact = MIXED and x.is_cuda and self._dtypes[name] == torch.bfloat16
                    _add_gram(self._sum(name, "inputs", rows), rows.bfloat16() if exact else rows)
                    self._sum(name, "magnitudes", rows).add_(rows.abs().sum(0))
        self._batch.clear()

    def _part(self, name: str) -> None:
        """Give a layer, which shared the sum of another one, its own."""
        owner = self.owner[name]
        self.owner[name] = name
        for kind in ("inputs", "magnitudes") if owner != name else ():
            self._sums[name, kind] = self._sums[owner, kind].clone()

    def reduce(self, processes: Processes) -> None:
        """Make the sums those of all processes; layers share inputs if they do in every process that has windows."""
        if processes.size > 1:
            self._gather(processes)
        for name in self.experts:
            self._lend(name + ".")

    def _gather(self, processes: Processes) -> None:
        everyone = processes.gather((self.owner, self.counts, self._dtypes))
        for name in self.counts:
            owners = {owner.get(name) for owner, *_ in everyone if owner}
            if len(owners) > 1 and name in self.owner:
                self._part(name)
            elif owners != {None}:
                self.owner[name] = name if len(owners) > 1 else str(owners.pop())
            self.counts[name] = sum(counts[name] for _, counts, _ in everyone)
        for _, _, dtypes in everyone:
            self._dtypes |= dtypes
        shapes: dict[tuple[str, str], torch.Size] = {}
        for theirs in processes.gather({key: total.shape for key, total in self._sums.items()}):
            shapes |= theirs
        for key, shape in sorted(shapes.items()):
            if key not in self._sums:
                self._sums[key] = torch.zeros(shape, device=self._device)
            processes.add(self._sums[key])

    def _lend(self, experts: str) -> None:
        """Make the moments of single experts those of a few tokens more, of the layer's average."""
        layers: dict[str, list[str]] = {}
        for name in self.counts:
            if name.startswith(experts):
                layers.setdefault(name.rpartition(".")[2], []).append(name)
        for layer, names in layers.items():
            reached = [name for name in names if self.counts[name]]
            if not reached:
                continue
            owner = self.owner[reached[0]].rpartition(".")[2]
            for name in names:
                if name not in self.owner:
                    own = f"{name.rpartition('.')[0]}.{owner}"
                    self.owner[name] = own if own in self.counts else name
                    self._dtypes[name] = self._dtypes[reached[0]]
            own_inputs = [name for name in names if self.owner[name] == name]
            more = self._lend_moments(own_inputs, "inputs", apart=layer == DOWN)
            self._lend_moments(own_inputs, "magnitudes", apart=layer == DOWN, more=more)
            self._lend_moments(names, "outputs", apart=layer != DOWN)

    def _lend_moments(self, names: list[str], kind: str, *, apart: bool, more: float | None = None) -> float:
        """Add to the sums of a kind those of `more` tokens of their average; returns how many.

        As many as a moment has directions, which is when it is known as well as it differs: Gaussian numbers leave an
        error of tr(M)^2 / (count |M|^2). apart: the experts' own neurons, which have nothing in common but their size.
        """
        sums = {name: self._sums[name, kind] for name in names if (name, kind) in self._sums}
        tokens = sum(self.counts[name] for name in sums)
        if not sums:
            return 0.0
        if more is None:
            more = sum(self.counts[name] * _directions(total) for name, total in sums.items()) / tokens
        average = torch.zeros_like(next(iter(sums.values())))
        for total in sums.values():
            average.add_(total, alpha=1 / tokens)
        if apart and average.ndim > 1:
            average = torch.diag_embed(average.diagonal().mean().expand(len(average)))
        elif apart:
            average = average.mean().expand_as(average)
        for name in names:
            if name not in sums:
                self._sums[name, kind] = average.clone(memory_format=torch.contiguous_format)
                continue  # as if one token had reached it: no expert is without any use
            count = self.counts[name]
            sums[name].add_(average, alpha=more).mul_(count / (count + more))
        return more

    def _sum(self, name: str, kind: str, x: Tensor) -> Tensor:
        if (name, kind) not in self._sums:
            n = x.shape[-1]
            shape = (n,) if kind == "magnitudes" else (n, n)
            self._sums[name, kind] = torch.zeros(shape, device=x.device)
        return self._sums[name, kind]

    def statistics(self, name: str, tokens: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Means, float32, on the CPU: inputs A and magnitudes E|x| of the owner over `tokens` tokens, outputs G.

        Those of the outputs are over the tokens that reached the layer: A counts already how many they are.

        The sums are deleted. A layer that was never reached gives nothing but "about" (see collect_statistics).
        """
        words = {"inputs": "inputs", "magnitudes": "inputs", "outputs": "output gradients"}
        for kind, word in words.items() if name in self.owner else ():
            if kind == "outputs" or self.owner[name] == name:
                over = max(self.counts[name], 1) if kind == "outputs" else tokens
                mean = _mean(self._sums.pop((name, kind)), over, f"the {word} of {name}")
                if kind == "outputs" and self._dtypes[name] == torch.float16:
                    self._require_no_underflow(name, mean)
                yield kind, {kind: mean}
        owner = torch.tensor(list(self.owner.get(name, "").encode()), dtype=torch.uint8)
        yield "about", {"count": torch.tensor(self.counts[name]), "kept_as": owner}

    def _require_no_underflow(self, name: str, outputs: Tensor) -> None:
        """Raise WeLoreError where float16 rounds the gradients to few bits, or to zero; outputs: their G (m, m)."""
        size = float(outputs.diagonal().mean()) ** 0.5
        if size < torch.finfo(torch.float16).tiny:
            raise WeLoreError(
                f"the gradients of {name} are too small for float16 ({size:.1g}): try --dtype bfloat16 or float32"
            )


class Losses:
    """The measured loss of removing each component of a matrix: E[(g^T a b^T x)^2] of W = sum of a b^T.

    modules: name -> linear layer. components: name of a layer -> its matrices or blocks that are measured, with all
    their factors, on the layer's device. Used like Moments. EKFAC, arXiv 1806.03884: second moments along the
    directions of K-FAC, without its assumption that inputs and gradients are independent.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], components: Callable[[str], Iterable[tuple[Target, Factors]]]
    ) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        for layer, module in modules.items():
            self._sums[layer] = {
                target.name: self._measure(module, target, factors) for target, factors in components(layer)
            }

    def _measure(self, module: nn.Module, target: Target, factors: Factors) -> Tensor:
        """The sums (k,) for a matrix, which grow while the module runs."""
        total = torch.zeros(factors.B.shape[0], dtype=finest_dtype(factors.B.device), device=factors.B.device)

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = _entering(args, kwargs)
            entering = x.reshape(-1, x.shape[-1])[:, target.columns].float() @ factors.B.T

            def leaves(g: Tensor) -> None:
                along = g.reshape(-1, g.shape[-1])[:, target.rows].float() @ factors.A * entering
                total.add_(along.square().sum(0, dtype=total.dtype))

            if y.requires_grad:
                y.register_hook(leaves)

        module.register_forward_hook(enters, with_kwargs=True)
        return total

    def end_batch(self) -> None:
        """Nothing is left to be added."""

    def reduce(self, processes: Processes) -> None:
        """Make the sums those of all processes."""
        for totals in self._sums.values():
            for total in totals.values():
                processes.add(total)

    def statistics(self, name: str, tokens: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield "losses" (k,), float32, means over `tokens` tokens; of a block "INDEX.losses"."""
        for matrix, total in self._sums.pop(name).items():
            mean = _mean(total, tokens, f"the losses of {matrix}")
            yield f"{matrix}.losses".removeprefix(name + "."), {"losses": mean}


Collector = Moments | Losses


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x.detach()


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors alive at the same time only if they show the same numbers."""
    return x.data_ptr(), x.shape, x.stride(), x._version


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle of `total` (n, n), float32; x: (tokens, n). Below it `total` stays as it is.

    On a CPU the product of bfloat16 numbers is bfloat16: every batch is rounded once, to 2^-9 of each entry.
    """
    n = x.shape[1]
    step = n if n <= SMALL else -(-n // PIECES)
    half = x.dtype == torch.bfloat16
    how: dict[str, Any] = {"out_dtype": torch.float32} if half and x.is_cuda and MIXED else {}
    x = x if half else x.float()
    for start in range(0, n, step):
        rows, left = total[start : start + step, start:], x[:, start : start + step].T
        if half:
            rows += torch.mm(left, x[:, start:], **how)
        else:
            rows.addmm_(left, x[:, start:])


def _directions(total: Tensor) -> float:
    """How many directions a moment has, tr^2 / |.|^2, and one more; total: its upper triangle."""
    norm = 2 * total.triu(1).square().sum() + total.diagonal().square().sum()
    return 1 + float(total.diagonal().sum().square() / norm.clamp(min=torch.finfo(total.dtype).tiny))


def _mean(total: Tensor, tokens: int, name: str) -> Tensor:
    """The mean of a sum, which it takes the memory of."""
    mean = total.div_(tokens).float()
    if mean.ndim == 2:
        mean.triu_()
        mean += mean.triu(1).T
    if not bool(torch.isfinite(mean.sum())):
        raise WeLoreError(f"{name} hold NaN or Inf: try --dtype float32, or look for damaged weights")
    return mean.cpu()
