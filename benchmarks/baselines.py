"""Ideas of others that need no data, in our words: narrower MLPs, whose neurons are chosen by their weights alone.

python benchmarks/baselines.py MODEL OUT magnitude|max-abs KEEP MULTIPLE

magnitude: the norm of all weights of a neuron. max-abs: the largest absolute weights of its rows in gate and up, added.
Every MLP loses as many neurons, those of the least score; nothing is refitted. OUT is an ordinary smaller checkpoint.
Prints what benchmarks/arena.py records. MODEL is a directory; KEEP a share of the targeted parameters; MULTIPLE is of
the widths.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from welore.cli.output import quiet_libraries
from welore.compression.plain import plain_width
from welore.config import CompressionConfig
from welore.models.load import load
from welore.models.mlp import Mlp, find_mlps, resize_layers
from welore.models.resizing import find_resizing
from welore.models.source import CheckpointSource

# A function of the rows of every up layer (c, width, d), and of the columns of the down layer (width, d).
Score = Callable[[list[Tensor], Tensor], Tensor]


def magnitude(rows: list[Tensor], columns: Tensor) -> Tensor:
    """Norm of all weights of every neuron (width,)."""
    return (torch.stack([up.square().sum((0, 2)) for up in rows]).sum(0) + columns.square().sum(1)).sqrt()


def max_abs(rows: list[Tensor], columns: Tensor) -> Tensor:
    """Sum over the rows of every neuron of their largest absolute weight (width,)."""
    return torch.stack([up.abs().amax(2).sum(0) for up in rows]).sum(0)


SCORES: dict[str, Score] = {"magnitude": magnitude, "max-abs": max_abs}


def main() -> None:
    """Write the model, print its share of the targeted parameters."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("score", choices=list(SCORES))
    arguments.add_argument("keep", type=float)
    arguments.add_argument("multiple", type=int)
    given = arguments.parse_args()
    quiet_libraries()
    print(json.dumps({"parameter_ratio": narrow(given.model, given.out, given.score, given.keep, given.multiple)}))


@torch.no_grad()
def narrow(model: Path, out: Path, score: str, keep: float, multiple: int) -> float:
    """Write the model with the neurons of the highest scores; the share of its targeted parameters that is left."""
    source = CheckpointSource(model)
    mlps = find_mlps(source.skeleton, source.targets)
    width = plain_width(source, CompressionConfig(keep=keep, optimize_for="anywhere", rank_multiple=multiple))
    shapes = {layer: shape for mlp in mlps for layer, shape in mlp.shapes(width).items()}
    resizing = find_resizing(source, shapes, mlps[0].width, width)
    net, tokenizer = load(model, torch.float32, "cpu")
    for mlp in mlps:
        keep_neurons(net, mlp, SCORES[score](*weights(net, mlp)).topk(width).indices.sort().values)
    resizing.apply(net.config)
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)
    dense = sum(m * n for m, n in (target.shape for target in source.targets))
    return 1 - sum((mlp.width - width) * mlp.numbers for mlp in mlps) / dense


def weights(net: Any, mlp: Mlp) -> tuple[list[Tensor], Tensor]:
    """The rows (c, width, d) of every up layer, and the columns of the down layer (width, d)."""
    matrices = [layer.matrix(net.get_submodule(layer.name).weight) for layer in mlp.layers]
    return [W.unflatten(0, (-1, mlp.width)) for W in matrices[:-1]], matrices[-1].T


def keep_neurons(net: Any, mlp: Mlp, neurons: Tensor) -> None:
    """Exchange the layers of an MLP for those of these neurons (count,)."""
    old = {layer.name: net.get_submodule(layer.name) for layer in mlp.layers}
    resize_layers(net, mlp.shapes(len(neurons)))
    for up in mlp.up_layers:
        for name, parameter in old[up.name].named_parameters():
            net.get_parameter(f"{up.name}.{name}").data = up.kind.take_rows(parameter.data, mlp.rows(up, neurons))
    down = mlp.down_layer
    W = down.kind.matrix(old[down.name].weight)[:, neurons]
    net.get_parameter(f"{down.name}.weight").data = down.kind.stored(W).contiguous()


if __name__ == "__main__":
    main()
