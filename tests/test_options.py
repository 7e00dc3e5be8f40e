"""The command line is made from the settings classes: names, defaults, choices, YAML files."""

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import welore
import welore.config as settings
from conftest import Command, done
from toys import checkpoint
from welore.allocation.strategies import STRATEGIES
from welore.calibration.scaling import SCALINGS
from welore.cli.from_config import expand
from welore.cli.main import VERBS, app
from welore.config import choices
from welore.data.self_generated import OPENINGS
from welore.errors import WeLoreError
from welore.evaluation.tasks import TASKS
from welore.layers.storage_forms import storages
from welore.training.methods import METHODS

CLASSES = [kind for kind in vars(settings).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (settings.StrategyName, STRATEGIES),
        (settings.ScalingName, SCALINGS),
        (settings.StorageName, storages()),
        (settings.MethodName, METHODS),
        (settings.TaskName, TASKS),
        (settings.OpeningName, OPENINGS),
    ],
)
def test_closed_set_has_the_names_of_its_registry(names: Any, registry: dict[str, Any]) -> None:
    assert set(choices(names)) == set(registry)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_setting_has_help_and_a_panel(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        assert field.metadata["help"].endswith((".", "2.")), field.name
        assert field.metadata["panel"], field.name


@pytest.mark.parametrize("kind", CLASSES)
def test_no_number_is_taken_that_cannot_work(kind: Any) -> None:
    """A number that a setting does not take is one sentence where it is given, never a traceback hours later."""
    counts = re.compile(
        "batch_size|num_(?!train_epochs)|max_(length|steps|eval)|limit|workers|probe|vocab_size|_steps|rank_multiple"
    )
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        numeric = typing.get_origin(hint) is not tuple and {int, float} & {hint, *typing.get_args(hint)}
        wrong: list[Any] = [float("nan"), float("-inf"), -(10**30)] if numeric and field.name != "seed" else []
        if counts.search(field.name):
            by_epochs = kind is settings.FinetuneConfig and field.name == "max_steps"  # -1, as the Trainer has it
            wrong += [10**30, 2.5, float("inf"), -2 if by_epochs else -1]
        for value in wrong:
            with pytest.raises(WeLoreError) as caught:
                kind(**{field.name: value})
            assert len(str(caught.value).splitlines()) == 1


def test_a_verb_has_an_option_for_every_field() -> None:
    parser: Any = typer.main.get_command(app)
    options = {option for parameter in parser.commands["finetune"].params for option in parameter.opts}
    for field in dataclasses.fields(settings.FinetuneConfig):
        if field.metadata.get("flag", field.name) is not None:
            assert f"--{field.name.replace('_', '-')}" in options


def test_shared_field_is_one_option_and_reaches_both_classes() -> None:
    seen: list[Any] = []

    def verb(one: settings.CompressionConfig, two: settings.CalibrationConfig, as_json: bool) -> None:
        seen.extend([one, two])

    expand(verb)(include=["q_proj"], split=False, num_tokens=7, as_json=False)
    assert seen[0] == settings.CompressionConfig(include=("q_proj",), split=False)
    assert seen[1] == settings.CalibrationConfig(include=("q_proj",), split=False, num_tokens=7)


def test_a_yaml_file_gives_the_options_and_the_command_line_overrides_it(
    command: Command, saved: Callable[..., Path], tmp_path: Path
) -> None:
    model, spectra = saved(), tmp_path / "s.safetensors"
    done(command("analyze", model, "-o", spectra))
    (tmp_path / "c.yaml").write_text("rank-reduction: 0.4\nmin_ratio: 0.3\nstrategy: uniform\n")
    (tmp_path / "one.yaml").write_text("exclude: layers.0\n")  # of several one is no list
    done(command("analyze", model, "-o", tmp_path / "some", "--config", tmp_path / "one.yaml"))
    assert welore.Spectra.load(tmp_path / "some").exclude == ("layers.0",)
    targets = ((), ("rank_reduction", 0.4)), (("--rank-reduction", 0.2), ("rank_reduction", 0.2))
    for arguments, target in (*targets, (("--keep", 0.9), ("keep", 0.9))):
        done(command("allocate", spectra, "-o", tmp_path / "p.json", "--config", tmp_path / "c.yaml", *arguments))
        plan = welore.Plan.load(tmp_path / "p.json")
        assert (plan.strategy, plan.min_ratio, plan.target) == ("uniform", 0.3, dict([target]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("kepp: 0.8", "c.yaml: allocate has no option 'kepp'; did you mean 'keep'"),
        ("- keep", "must map option names to values"),
        ("keep: [", "cannot be read as YAML"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_is_one_sentence(
    refused: Callable[..., str], tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / "c.yaml").write_text(content)
    config = ("--config", tmp_path / "c.yaml")
    assert sentence in refused("allocate", tmp_path / "s", "-o", tmp_path / "p.json", *config)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("allocate S -o P --strategy welor", "unknown strategy 'welor'; did you mean 'welore'"),
        ("allocate S -o P --keep much", "should be a valid number|not a valid float"),
        ("allocate S -o P --kepp 0.8", "no such option: --kepp"),
        ("alocate S", "no such command 'alocate'. Did you mean 'allocate'"),
        ("allocate -o P --keep 0.8", "[Mm]issing"),
        ("finetune M OUT --adam-beta3 1", "has an option 'adam_beta3'; did you mean 'adam_beta"),
        ("finetune M OUT --adam-beta2 x", "--adam-beta2 cannot be 'x'"),
        ("finetune M OUT more", "'more' belongs to no option"),
        (
            "finetune M OUT --per_device_train_batch_size 2",
            "per_device_train_batch_size is .* to give: give batch_size",
        ),
        ("finetune M OUT --bf16", "bf16 is no training argument to give: give dtype"),
        ("finetune M OUT --assistant-only-loss", "give nothing, or loss_on_prompt for the opposite"),
        ("finetune M OUT --max_steps 0", "max_steps is 0"),
        ("finetune --model M --output_dir OUT", "--model is in the place of MODEL or OUTPUT_DIR"),
        ("finetune M --logging-steps 5 OUT", "--logging-steps is in the place of MODEL or OUTPUT_DIR"),
    ],
)
def test_wrong_usage_is_one_sentence(refused: Callable[..., str], words: str, sentence: str) -> None:
    assert re.search(sentence, refused(*words.split()))


def test_any_training_argument_goes_by_its_own_name(command: Command, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "small")
    run = ("--dataset", "pydoc", "--max-steps", 2, "--max-length", 16, "--batch-size", 1, "--eval-steps", 0)
    given = ("--lr-scheduler-type", "linear", "--adam-beta2=0.9", "--save_steps", 0, "--json")
    facts = json.loads(command("finetune", model, tmp_path / "run", *run, *given).out)
    assert facts["settings"]["training_arguments"] == {"lr_scheduler_type": "linear", "adam_beta2": 0.9}


def test_a_yaml_file_gives_training_arguments_which_the_command_line_overrides(
    command: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    model, file = checkpoint(tmp_path / "small"), tmp_path / "c.yaml"
    run = ("finetune", model, tmp_path / "run", "--dataset", "pydoc", "--max-length", 16, "--config", file)
    file.write_text("max_stepz: 2\n")
    assert "did you mean 'max_steps'" in refused(*run)
    file.write_text("adam-beta2: much\n")
    assert "--adam-beta2 cannot be 'much'" in refused(*run)
    file.write_text(
        "{max_steps: 2, batch-size: 1, eval_steps: 0, adam-epsilon: 1e-9, adam_beta2: 0.8, lr_scheduler_type: linear,"
        " logging_first_step: true, optim_args: null}"
    )
    facts = json.loads(command(*run, "--adam-beta2", 0.9, "--json").out)
    others = {"lr_scheduler_type": "linear", "logging_first_step": True}
    assert facts["settings"]["training_arguments"] == {"adam_epsilon": 1e-9, "adam_beta2": 0.9} | others
    assert (facts["settings"]["max_steps"], facts["settings"]["batch_size"]) == (2, 1)


def test_public_names_are_the_same_for_the_interpreter_and_for_editors() -> None:
    source = ast.parse(Path(str(welore.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == welore._MODULE_OF
    assert set(welore.__all__) == {*typed, *(name for name in vars(welore) if name in welore.__all__)}


def test_every_verb_is_a_public_function() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names == {verb.__name__ for verb in VERBS} <= set(welore.__all__)


# --- keywords of Python ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "name", "message"),
    [
        (welore.compress, "rank_reduction", r"pass AllocationConfig\(rank_reduction=.* or CompressionConfig\("),
        (
            welore.finetune,
            "gradient_checkpointing",
            r"pass FinetuneConfig\(gradient_checkpointing=\.\.\.\) or Pretrain",
        ),
        (welore.finetune, "overwritten", "overwritten is no keyword of this function; did you mean 'overwrite'"),
        (welore.merge, "max_length", r"EvaluationConfig\(max_length=\.\.\.\)"),
    ],
)
def test_a_setting_that_is_no_keyword_is_answered_with_its_class(
    verb: Callable[..., Any], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeLoreError, match=message):
        verb("model", tmp_path / "out", **{name: 1})
    assert not [*tmp_path.iterdir()]


def test_settings_in_the_place_of_the_output_are_refused() -> None:
    with pytest.raises(WeLoreError, match="leads nowhere: expected str, .*, not CompressionConfig"):
        welore.compress("model", welore.CompressionConfig(keep=0.8))  # type: ignore[arg-type]
    with pytest.raises(WeLoreError, match="leads nowhere: expected str, .*, not FinetuneConfig"):
        welore.finetune("model", welore.FinetuneConfig(dataset="pydoc"), dataset="pydoc")  # type: ignore[arg-type]


@pytest.mark.parametrize("recovery", ["none", "my.txt"])
def test_a_recovery_that_is_a_text_is_not_taken_for_auto(recovery: Any, tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "dense", None)
    with pytest.raises(WeLoreError, match=r"str is no settings: give welore.RecoveryConfig\(\.\.\.\)"):
        welore.compress(dense, tmp_path / "out", keep=0.8, recovery=recovery)


@pytest.mark.parametrize(
    ("verb", "name", "kind"),
    [
        (welore.compress, "config", "CompressionConfig"),
        (welore.compress, "calibration", "CalibrationConfig"),
        (welore.compress, "recovery", "RecoveryConfig"),
        (welore.finetune, "config", "FinetuneConfig"),
        (welore.evaluate, "config", "EvaluationConfig"),
    ],
)
def test_a_dict_of_settings_is_answered_with_its_class(
    verb: Callable[..., Any], name: str, kind: str, tmp_path: Path
) -> None:
    dense = checkpoint(tmp_path / "dense", None)
    needed = [] if verb is welore.evaluate else [tmp_path / "out"]
    config = {"config": welore.CompressionConfig(keep=0.8)} if verb is welore.compress else {}
    with pytest.raises(WeLoreError, match=rf"dict is no settings: give welore.{kind}\(\.\.\.\)"):
        verb(dense, *needed, **config | {name: {"keep": 0.8}})
    assert [*tmp_path.iterdir()] == [dense]


def test_a_list_of_texts_in_a_yaml_file_is_a_mixture(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four " * 200)
    (tmp_path / "c.yaml").write_text(f"dataset: [{tmp_path / 'a.txt'}, pydoc]\nnum_tokens: 64\nmax_length: 16\n")
    dense = checkpoint(tmp_path / "dense", None)
    done(command("calibrate", dense, "-o", tmp_path / "s.safetensors", "--config", tmp_path / "c.yaml"))
    sources = welore.Statistics.load(tmp_path / "s.safetensors").record.inputs["sources"]
    assert [Path(source["name"]).name for source in sources] == ["a.txt", "pydoc"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_target_is_no_switch(keep: bool) -> None:
    with pytest.raises(welore.WeLoreError, match=f"keep is {keep}: it is a fraction"):
        settings.CompressionConfig(keep=keep)
