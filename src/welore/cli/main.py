"""The command line: one entry per verb, and how a mistake ends."""

import os
import re
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

from welore.cli.compression import allocate, analyze, calibrate, compress, export, info, merge
from welore.cli.ending import Stopped, flush_output, say_end, stoppable
from welore.cli.evaluation import evaluate, score
from welore.cli.from_config import Verb, expand
from welore.cli.reports import demo, report
from welore.cli.training import finetune, pretrain
from welore.config import ALTERNATIVES

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
OPEN = {finetune: {"allow_extra_args": True, "ignore_unknown_options": True}}  # they take another library's options


class Spelled(TyperCommand):
    """A command whose options may be spelled as in TRL: --max_steps is --max-steps."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does, options with hyphens; one that is given overrides its alternatives in the file of --config."""
        args = super().parse_args(ctx, [re.sub(r"^--[\w-]+", lambda n: n[0].replace("_", "-"), a) for a in args])
        for names in ALTERNATIVES:
            sources = {name: getattr(ctx.get_parameter_source(name), "name", None) for name in names}
            if "COMMANDLINE" in sources.values():
                ctx.params |= {name: None for name, source in sources.items() if source == "DEFAULT_MAP"}
        return args


app = typer.Typer(name="welore", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for _verb, _example in VERBS.items():
    app.command(cls=Spelled, epilog=f"Example: `{_example}`", context_settings=OPEN.get(_verb))(expand(_verb))


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
    """Run the command line; every end but a good one is one sentence.

    Exit status: 2 for a mistake or a full disk or memory, 3 for a failed recovery, 1 for a bug, 130 and 143 if stopped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a service may have closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - to the end
    try:
        with stoppable():
            status = typer.main.get_command(app).main(prog_name="welore", standalone_mode=False)
            flush_output()
    except (Exception, KeyboardInterrupt, Stopped) as error:  # the last net: whatever comes, no traceback
        sys.exit(say_end(error))
    sys.exit(status if isinstance(status, int) else 0)
