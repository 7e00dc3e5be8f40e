"""The command line: one entry per verb, and how a mistake ends."""

import sys
from importlib import metadata
from typing import Annotated

import typer
import typer.main

from welore.cli.compression import allocate, analyze, calibrate, compress, export, info, merge
from welore.cli.evaluation import evaluate, score
from welore.cli.from_config import Verb, expand
from welore.cli.output import usage_sentence
from welore.cli.reports import demo, report
from welore.cli.training import finetune, pretrain
from welore.errors import WeLoreError

VERBS: dict[Verb, str] = {  # in the order of the help, with an example each
    compress: "welore compress HuggingFaceTB/SmolLM2-135M small --keep 0.8",
    evaluate: "welore evaluate small --dataset pydoc --max-length 512 --num-windows 16",
    finetune: "welore finetune small tuned --dataset pydoc --max-steps 100 --max-length 256",
    info: "welore info small",
    merge: "welore merge small dense-again",
    export: "welore export small dense-again --format dense",
    score: "welore score tuned/model --task coin_flip --dataset generated",
    calibrate: "welore calibrate HuggingFaceTB/SmolLM2-135M --dataset self -o statistics.safetensors",
    analyze: "welore analyze HuggingFaceTB/SmolLM2-135M -o spectra.safetensors",
    allocate: "welore allocate spectra.safetensors --rank-reduction 0.3 -o plan.json",
    pretrain: "welore pretrain study --size 2m --vocab-size 4096 --dataset wikitext2 --max-steps 1500",
    report: "welore report runs/ -o report",
    demo: "welore demo",
}
OPEN = {finetune}  # verbs that take options of another library, too

app = typer.Typer(name="welore", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for _verb, _example in VERBS.items():
    app.command(
        epilog=f"Example: `{_example}`",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True} if _verb in OPEN else None,
    )(expand(_verb))


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
        status = typer.main.get_command(app).main(prog_name="welore", standalone_mode=False)
    except WeLoreError as error:
        _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the option parser's
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(0)
        _fail(usage_sentence(error.format_message()))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(sentence: str) -> None:
    print(f"welore: {sentence}", file=sys.stderr)
    sys.exit(2)
