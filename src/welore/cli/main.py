"""The command line: parse, call one function, save one artefact, print one line. The only package that prints."""

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from welore.cli.analysis import allocate, analyze, calibrate
from welore.cli.compression import compress, merge
from welore.cli.models import evaluate, finetune, pretrain, score
from welore.cli.results import demo, report
from welore.errors import WeLoreError

VERBS: dict[Callable[..., None], str] = {  # in the order of the help, with an example each
    analyze: "welore analyze HuggingFaceTB/SmolLM2-135M -o spectra.safetensors",
    allocate: "welore allocate spectra.safetensors --rank-reduction 0.3 -o plan.json",
    calibrate: "welore calibrate HuggingFaceTB/SmolLM2-135M --data self -o calibration.safetensors",
    compress: "welore compress HuggingFaceTB/SmolLM2-135M small --params 0.8",
    merge: "welore merge small dense-again",
    evaluate: "welore evaluate small --data pydoc --length 512 --windows 16",
    finetune: "welore finetune small tuned --data pydoc --steps 100 --length 256",
    score: "welore score tuned/model --task coin_flip --data generated",
    pretrain: "welore pretrain study --size 2m --vocabulary 4096 --data wikitext2 --steps 1500",
    report: "welore report runs/ -o report",
    demo: "welore demo",
}

app = typer.Typer(
    name="welore",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _verb, _example in VERBS.items():
    app.command(epilog=f"Example: `{_example}`")(_verb)


def _version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("welore"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress any Hugging Face decoder by non-uniform low rank, and load it anywhere transformers does."""


def main() -> None:
    """Run the command line; a mistake of the user is one sentence and exit status 2."""
    try:
        app()
    except WeLoreError as error:
        print(f"welore: {error}", file=sys.stderr)
        sys.exit(2)
