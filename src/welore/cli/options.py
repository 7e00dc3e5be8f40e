"""Arguments and options that several verbs take, and how they are read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from welore.errors import WeLoreError

Model = Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False, dir_okay=False)]
Include = Annotated[list[str] | None, typer.Option(help="Target only modules that match: q_proj, 'layers.*.mlp'.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave modules that match dense.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads and converted .gguf files are kept.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Workers = Annotated[int | None, typer.Option(help="Matrices in work at once. [default: one per core]")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1. [default: a GPU if there is one]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")]
RankReduction = Annotated[float | None, typer.Option(help="Target: effective rank reduction (ERR), 0..1.")]
Params = Annotated[
    float | None, typer.Option("--keep", "--params", help="Target: parameters kept in the targeted matrices, 0..1.")
]
Threshold = Annotated[float | None, typer.Option(help="Target: the threshold on normalised singular values itself.")]
StrategyName = Annotated[
    str | None,
    typer.Option(
        help="How values are compared across matrices: welore, uniform, owl, energy, waterfill. "
        "[default: waterfill; welore where nothing is scaled]"
    ),
]
StorageName = Annotated[
    str | None,
    typer.Option(
        help="How low-rank matrices are stored: factored, pivoted (smaller), auto (the smaller). "
        "[default: auto; factored where nothing is scaled]"
    ),
]
Split = Annotated[
    bool | None,
    typer.Option(
        "--split/--no-split",
        help="Cut matrices at least twice as long as wide block by block. [default: where the scaling is kfac]",
        show_default=False,
    ),
]
MinRatio = Annotated[
    str | None,
    typer.Option(
        help="Factor a matrix iff it loses more than this share of its rank; or 'break-even': iff factors are smaller. "
        "[default: 0.5 for welore, break-even for waterfill, else 0]"
    ),
]
RankMultiple = Annotated[int, typer.Option(help="Make ranks multiples of this; 16 suits most kernels.")]
AllowGrowth = Annotated[bool, typer.Option("--allow-growth", help="Also factor matrices that become larger by it.")]
TaskName = Annotated[
    str | None, typer.Option(help="commonsense_qa, svamp, boolq, coin_flip, object_tracking or strategy_qa.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of one weight file.")]
Label = Annotated[str | None, typer.Option(help="A name for tables and figures.")]
ReadDtype = Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, float16 or bfloat16.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate; a cosine brings it down to a tenth.")]
WarmUp = Annotated[int | None, typer.Option(help="Steps up to the peak.  [default: one in twenty]")]
Accumulation = Annotated[int, typer.Option(help="Batches added up to one step.")]
Optimizer = Annotated[str, typer.Option(help="Any optimiser of transformers' Trainer.")]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are clipped to this norm; 0: not at all.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint in OUT.")]
ReportTo = Annotated[str, typer.Option(help="none, tensorboard, trackio or wandb.")]
TaskData = Annotated[
    str | None, typer.Option(help="The task's original file, or 'generated'.  [default: the hub's data set]")
]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute twice, remember less; the same losses.")
]


def ratio_of(text: str | None) -> Any:
    """A --min-ratio as the library takes it."""
    if text is None or text == "break-even":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise WeLoreError(f"min-ratio is {text!r}: it is a fraction such as 0.5, or break-even") from error
