"""Second moments of the inputs and of the output gradients of linear layers, summed by hooks while a model runs.

torch only. Products and their sums are float32, whatever the model computes in: 4 bytes for every number of the
statistics while they are gathered.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from welore.calibration.borrowing import Pool
from welore.errors import WeLoreError
from welore.io.context import finest_dtype
from welore.io.parallel import Processes
from welore.io.resume import Workspace
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
        self.sums: dict[tuple[str, str], Tensor] = {}  # of a layer and a kind
        self._batch: dict[str, list[Tensor]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # in which the layers compute
        self._device = next((p.device for module in modules.values() for p in module.parameters()), torch.device("cpu"))
        for name, module in modules.items():
            module.register_forward_hook(partial(self._enters, name), with_kwargs=True)

    def _enters(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = _entering(args, kwargs)
        if not x.numel():
            return
        self._batch.setdefault(name, []).append(x)
        total = self._sum(name, "outputs", y)
        self.dtypes[name] = y.dtype
        if y.requires_grad:
            y.register_hook(lambda g: _add_gram(total, g.reshape(-1, g.shape[-1])))

    def end_batch(self) -> None:
        """Add what entered the modules since the last call."""
        tensors = {  # equal for two inputs alive at the same time only if they show the same numbers
            name: tuple((x.data_ptr(), x.shape, x.stride(), x._version) for x in xs) for name, xs in self._batch.items()
        }
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
                    exact = MIXED and x.is_cuda and self.dtypes[name] == torch.bfloat16
                    _add_gram(self._sum(name, "inputs", rows), rows.bfloat16() if exact else rows)
                    self._sum(name, "magnitudes", rows).add_(rows.abs().sum(0))
        self._batch.clear()

    def _part(self, name: str) -> None:
        """Give a layer, which shared the sum of another one, its own."""
        owner = self.owner[name]
        self.owner[name] = name
        for kind in ("inputs", "magnitudes") if owner != name else ():
            self.sums[name, kind] = self.sums[owner, kind].clone()

    def reduce(self, processes: Processes) -> None:
        """Make the sums those of all processes; layers share inputs if they do in every process that has windows."""
        if processes.size > 1:
            self._gather(processes)
        for name in self.experts:
            pool = Pool()
            pool.add(self, name + ".")
            pool.lend(self, name + ".")

    def set_aside(self, workspace: Workspace, processes: Processes) -> None:
        """Move the sums, which are those of all processes, into the workspace."""
        for key, total in self.sums.items():
            if processes.is_main:
                workspace.store(_sum_name(key), {"sum": total})
        self.sums = dict.fromkeys(self.sums, torch.empty(0))

    def take_back(self, workspace: Workspace, processes: Processes) -> None:
        """Move them back."""
        for key in self.sums:
            stored = workspace.fetch(_sum_name(key))
            if stored is None:
                raise OSError(f"{key[0]} in {workspace.directory} was damaged: run the same command again")
            self.sums[key] = stored["sum"].to(self._device)
        processes.wait()
        for key in self.sums if processes.is_main else ():
            workspace.drop(_sum_name(key))

    def _gather(self, processes: Processes) -> None:
        everyone = processes.gather((self.owner, self.counts, self.dtypes))
        for name in self.counts:
            owners = {owner.get(name) for owner, *_ in everyone if owner}
            if len(owners) > 1 and name in self.owner:
                self._part(name)
            elif owners != {None}:
                self.owner[name] = name if len(owners) > 1 else str(owners.pop())
            self.counts[name] = sum(counts[name] for _, counts, _ in everyone)
        for _, _, dtypes in everyone:
            self.dtypes |= dtypes
        shapes: dict[tuple[str, str], torch.Size] = {}
        for theirs in processes.gather({key: total.shape for key, total in self.sums.items()}):
            shapes |= theirs
        for key, shape in sorted(shapes.items()):
            if key not in self.sums:
                self.sums[key] = torch.zeros(shape, device=self._device)
            processes.add(self.sums[key])

    def _sum(self, name: str, kind: str, x: Tensor) -> Tensor:
        if (name, kind) not in self.sums:
            n = x.shape[-1]
            shape = (n,) if kind == "magnitudes" else (n, n)
            self.sums[name, kind] = torch.zeros(shape, device=x.device)
        return self.sums[name, kind]

    def statistics(self, name: str, tokens: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Means, float32, on the CPU: inputs A and magnitudes E|x| of the owner over `tokens` tokens, outputs G.

        Those of the outputs are over the tokens that reached the layer: A counts already how many they are.

        The sums are deleted. A layer that was never reached gives nothing but "about" (see collect_statistics).
        """
        words = {"inputs": "inputs", "magnitudes": "inputs", "outputs": "output gradients"}
        for kind, word in words.items() if name in self.owner else ():
            if kind == "outputs" or self.owner[name] == name:
                over = max(self.counts[name], 1) if kind == "outputs" else tokens
                mean = _mean(self.sums.pop((name, kind)), over, f"the {word} of {name}")
                if kind == "outputs" and self.dtypes[name] == torch.float16:
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


def _sum_name(key: tuple[str, str]) -> str:
    """Under which a sum of a layer and a kind is set aside."""
    return "{}.{}-sum".format(*key)


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


def _mean(total: Tensor, tokens: int, name: str) -> Tensor:
    """The mean of a sum, which it takes the memory of."""
    mean = total.div_(tokens).float()
    if mean.ndim == 2:
        mean.triu_()
        mean += mean.triu(1).T
    if not bool(torch.isfinite(mean.sum())):
        raise WeLoreError(f"{name} hold NaN or Inf: try --dtype float32, or look for damaged weights")
    return mean.cpu()
