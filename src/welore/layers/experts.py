"""The experts of a mixture as ordinary linear layers: nn.Modules and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DOWN = "down_proj"


class Gate:
    """The function of a family between the products of an expert: its activation, and the gate if it has one.

    fused: the family's own module of all experts, without its parameters. It is no part of the model.
    """

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def __call__(self, products: list[Tensor]) -> Tensor:
        """products: (tokens, f) each, or one (tokens, 2 f) -> (tokens, f)."""
        if not hasattr(self.fused, "has_gate"):  # Llama 4 has no function for it
            return torch.mul(self.fused.act_fn(products[0]), products[1])
        joined = products[0] if len(products) == 1 else torch.cat(products, -1)
        y: Tensor = self.fused._apply_gate(joined) if self.fused.has_gate else self.fused.act_fn(joined)
        return y


class Expert(nn.Module):
    """One expert, an MLP: down_proj reads what `gate` makes of the outputs of all other layers."""

    def __init__(self, layers: Mapping[str, nn.Linear], gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        products = [layer(x) for name, layer in self.named_children() if name != DOWN]
        y: Tensor = self.get_submodule(DOWN)(self.gate(products))
        return y


class Experts(nn.Module):
    """The experts of one layer, called 0, 1, ...; in the place of a family's module that holds 3-D parameters.

    gate: of all of them; it has that module without its parameters.
    """

    def __init__(self, experts: list[Expert], gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its weight.

        hidden_states: (tokens, d). top_k_index, top_k_weights: (tokens, k), the experts of every token -> (tokens, d).
        """
        experts, (tokens, k) = list(self.children()), top_k_index.shape
        chosen, order = top_k_index.flatten().sort(stable=True)
        borders = torch.arange(len(experts) + 1, device=chosen.device)
        counts = torch.searchsorted(chosen, borders).diff().tolist()  # one wait for a GPU; bincount has two of its own
        parts = hidden_states[order // k].split(counts)
        outputs = [expert(x) for expert, x in zip(experts, parts, strict=True) if len(x)]
        if not outputs:
            return torch.zeros_like(hidden_states)
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
        return weighted[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def routing(self, **arguments: Tensor) -> tuple[slice | Tensor, dict[str, Tensor]]:
        """The rows of the output that experts make, and the arguments of `Experts.forward` that make them."""
        return slice(None), arguments


class RepeatingExperts(Experts):
    """As Experts, where the family repeats all tokens for every expert and adds the outputs itself (Llama 4).

    Tokens come times their weight, which is 0 for experts that they have not chosen: without biases the output is 0.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states: (experts * tokens, d), those of one expert after those of another -> the same shape."""
        rows, arguments = self.routing(hidden_states=hidden_states)
        return torch.zeros_like(hidden_states).index_put_((rows,), super().forward(**arguments))

    def routing(self, **arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows that are not zeros, each of which is a token that one expert reads."""
        x = arguments["hidden_states"]
        rows = x.any(-1).nonzero()[:, 0]
        index = rows // (len(x) // len(self._modules))
        weights = x.new_ones(len(rows), 1)
        return rows, {"hidden_states": x[rows], "top_k_index": index[:, None], "top_k_weights": weights}
