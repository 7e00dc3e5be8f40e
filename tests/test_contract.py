"""The names of the command line that scripts outside this repository use: every verb takes them, and runs with them."""

from pathlib import Path
from typing import Any

import pytest
import typer.main

from conftest import Command, done
from toys import checkpoint
from welore.cli.main import app

EVERYWHERE = "--json --config"
OPTIONS = {
    "analyze": "-o --scaling --statistics --include --exclude --device --workers --revision --reference-values",
    "allocate": "-o --keep --rank-reduction --threshold --strategy --min-ratio --storage --allow-growth "
    "--rank-multiple",
    "calibrate": "-o --dataset --num-tokens --max-length --measure-losses --seed --temperature --top-k --top-p --first "
    "--batch-size --dtype --device",
    "compress": "--keep --rank-reduction --threshold --plan --preset --paper --strategy --scaling --storage "
    "--statistics --mlp-pruning --recovery --num-tokens --device --workers --overwrite --dry-run --min-ratio "
    "--rank-multiple --allow-growth --seed --include --exclude --max-shard-size --reference-checkpoint --split",
    "merge": "--max-shard-size --revision --cache-dir",
    "export": "--format",
    "info": "",
    "evaluate": "--dataset --max-length --num-windows --against --lm-eval --batch-size --dtype --label --device "
    "--limit --output --tasks-dir --save-logprobs --top-logprobs",
    "finetune": "--method --dataset --task --max-steps --learning-rate --batch-size --max-length --eval-steps "
    "--save-steps --seed --resume --distill --warmup-steps --gradient-accumulation-steps --dtype --save-dtype "
    "--attention --rank --optimizer --weight-decay --max-grad-norm --max-eval-samples --distill-weight "
    "--distill-temperature --self-tokens --report-to --task-dataset --plan --label",
    "score": "--task --dataset --limit --batch-size --dtype --device --label",
    "pretrain": "--size --dataset --max-steps --seed --resume --tokenizer --vocab-size --learning-rate "
    "--warmup-steps --batch-size --gradient-accumulation-steps --max-length --dtype --optimizer --probes "
    "--probe-items --max-eval-samples --save-steps --report-to --max-grad-norm",
    "report": "-o",
    "demo": "",
}


@pytest.mark.parametrize("verb", OPTIONS)
def test_verb_takes_the_options_of_the_contract(verb: str) -> None:
    parser: Any = typer.main.get_command(app)
    options = {name for parameter in parser.commands[verb].params for name in parameter.opts}
    assert options >= set(f"{OPTIONS[verb]} {EVERYWHERE}".split())


def test_every_verb_runs_with_those_names(command: Command, tmp_path: Path) -> None:
    model, text = checkpoint(tmp_path / "model", None, max_position_embeddings=256), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog and reads a program. " * 80)
    short = ("--max-length", 32, "--batch-size", 1)
    training = ("--max-steps", 4, "--eval-steps", 2, "--save-steps", 0, "--seed", 1, *short)

    def out(name: str) -> Path:
        return tmp_path / name

    size = ("--num-tokens", 512, "--max-length", 32, "--measure-losses", 0.5, "--seed", 0)
    done(command("calibrate", model, "-o", out("c"), "--dataset", text, *size))
    done(command("analyze", model, "-o", out("s"), "--scaling", "kfac", "--statistics", out("c")))
    method = ("--strategy", "waterfill", "--min-ratio", "break-even", "--storage", "auto", "--rank-multiple", 2)
    done(command("allocate", out("s"), "-o", out("p.json"), "--keep", 0.7, *method))
    done(command("compress", model, out("planned"), "--plan", out("p.json"), "--statistics", out("c")))
    done(command("compress", model, out("paper"), "--rank-reduction", 0.4, "--paper", "--overwrite", "--workers", 1))
    recovery = ("--recovery", text, "--num-tokens", 1536, "--device", "cpu")
    answer = command("compress", model, out("small"), "--keep", 0.7, "--statistics", out("c"), *recovery)
    assert answer.status == 0, answer.err
    fast = ("--preset", "fast", "--mlp-pruning", 0.25, "--num-tokens", 256)
    assert command("compress", model, out("fast"), "--keep", 0.6, *fast).status == 0
    assert command("compress", model, out("never"), "--keep", 0.8, "--dry-run").status == 0
    assert not out("never").exists()
    assert "welore" in command("info", out("small")).out.lower()
    done(command("merge", out("small"), out("merged")))
    done(command("export", out("small"), out("exported"), "--format", "dense"))
    windows = ("--dataset", text, "--max-length", 32, "--num-windows", 4)
    done(command("evaluate", out("small"), *windows, "-o", out("small.ppl.json")))
    done(command("evaluate", out("small"), *windows, "--against", model))
    tuned = command("finetune", out("paper"), out("tuned"), "--method", "lrc", "--dataset", text, *training)
    assert tuned.status == 0, tuned.err
    task = ("--task", "coin_flip", "--task-dataset", "generated", "--max-length", 256, "--batch-size", 1)
    coins = command("finetune", out("paper"), out("coins"), *task, "--max-steps", 1, "--eval-steps", 0)
    assert coins.status == 0, coins.err
    distilled = command("finetune", out("paper"), out("taught"), "--distill", model, "--dataset", text, *training)
    assert distilled.status == 0, distilled.err
    done(command("score", out("tuned") / "model", "--task", "coin_flip", "--dataset", "generated", "--limit", 2))
    study = ("--size", "16/1/1/16", "--vocab-size", 280, "--probes", 4, "--probe-items", 1, "--max-eval-samples", 2)
    steps = ("--max-steps", 4, "--max-length", 16, "--batch-size", 1, "--save-steps", 0)
    done(command("pretrain", out("study"), "--dataset", text, *study, *steps))
    done(command("report", tmp_path, "-o", out("report")))
