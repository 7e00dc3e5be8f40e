import json
from pathlib import Path
from typing import Any

import pytest

from welore.errors import WeLoreError, choose
from welore.evaluation.tasks import TASKS, Item, items, majority_rate
from welore.evaluation.tasks import hub_items as rows_of

FILES = {
    "commonsense_qa": ("x_train_rand_split.jsonl", "x_dev_rand_split.jsonl"),
    "svamp": ("SVAMP.json",) * 2,
    "boolq": ("boolq_train.jsonl", "boolq_dev.jsonl"),
    "coin_flip": ("coin_flip.json",) * 2,
    "object_tracking": ("Bigbench_object_tracking_task.json",) * 2,
    "strategy_qa": ("StrategyQA_task.json",) * 2,
}


def record(task: str, n: int) -> dict[str, Any]:
    """A record in the format of the task's original file."""
    choices = [{"label": label, "text": f"thing {label}{n}"} for label in "ABCDE"]
    return {
        "commonsense_qa": {"answerKey": "ABCDE"[n % 5], "question": {"stem": f"Which {n}?", "choices": choices}},
        "svamp": {"Body": f"Ann has {n} pears", "Question": "How many?", "Answer": float(n)},
        "boolq": {"question": f"is it {n}", "passage": f"It is {n}.", "answer": n % 2 == 0},
        "coin_flip": {"question": f"A coin is heads up. Ann flips it {n} times. Heads?", "answer": "yes"},
        "object_tracking": {"input": f"Ann has {n}", "target_scores": {"a.": 0, "b.": 1, "c.": 0}},
        "strategy_qa": {"input": f"Is {n} even?", "target_scores": {"Yes": 1 - n % 2, "No": n % 2}},
    }[task]


def write(directory: Path, task: str, records: list[Any]) -> Path:
    for name in set(FILES[task]):
        if name.endswith(".jsonl"):
            own = [json.loads(json.dumps(r).replace("?", f" {name}?").replace("It is", name)) for r in records]
            (directory / name).write_text("\n".join(map(json.dumps, own)) + "\n")
        else:
            content = records if task == "svamp" else {"canary": "x", "examples": records}
            (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", TASKS)
def test_training_and_evaluation_items_are_disjoint_and_cover_the_file(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, [record(name, n) for n in range(20)])
    train, evaluation = (items(TASKS[name], part, tmp_path) for part in ("train", "evaluation"))
    share = TASKS[name].train_share
    assert (len(train), len(evaluation)) == ((20, 20) if share is None else (int(20 * share), 20 - int(20 * share)))
    assert not {item.prompt for item in train} & {item.prompt for item in evaluation}


def test_a_question_in_both_parts_is_left_out_of_training(tmp_path: Path) -> None:
    write(tmp_path, "strategy_qa", [record("strategy_qa", n % 9) for n in range(10)])  # the last repeats the first
    train, evaluation = (items(TASKS["strategy_qa"], part, tmp_path) for part in ("train", "evaluation"))
    assert (len(train), len(evaluation)) == (6, 3)


@pytest.mark.parametrize(
    ("name", "prompt", "completion"),
    [
        ("commonsense_qa", "A: Among A through E, the answer is", " D."),
        ("svamp", "A: The answer (arabic numerals) is", " 13."),
        ("boolq", "A: Among True and False, the answer is", " False."),
        ("coin_flip", "A: The answer is", " yes."),
        ("object_tracking", "A: Among A through C, the answer is", " B."),
        ("strategy_qa", "A: The answer is", " no."),
    ],
)
def test_the_prompt_ends_where_the_answer_begins(name: str, prompt: str, completion: str) -> None:
    item = TASKS[name].item(record(name, 13), "here")
    assert item.prompt.splitlines()[-1] == prompt
    assert item.completion == completion
    assert item.prompt.startswith("Q: ")


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        ("commonsense_qa", " B.", "B"),
        ("commonsense_qa", " B", "B"),
        ("commonsense_qa", " B\nQ: Another", "B"),
        ("commonsense_qa", " A dog is an animal", None),
        ("commonsense_qa", " the second one, B.", None),
        ("commonsense_qa", " F.", None),
        ("commonsense_qa", " b.", None),
        ("commonsense_qa", "", None),
        ("svamp", " 51.", "51"),
        ("svamp", " 51.0.", "51"),
        ("svamp", " 1,200.", "1200"),
        ("svamp", " -0.5.", "-0.5"),
        ("svamp", " 51 pears.", None),
        ("svamp", " fifty.", None),
        ("boolq", " true.", "True"),
        ("boolq", " Truely", None),
        ("coin_flip", " Yes.", "yes"),
        ("coin_flip", " yes and no.", None),
        ("object_tracking", " D.", None),
    ],
)
def test_only_an_answer_that_completes_the_sentence_is_extracted(name: str, output: str, expected: str | None) -> None:
    assert TASKS[name].extract(output) == expected


def test_rows_of_the_hub_give_the_same_items_as_the_files() -> None:
    original = record("commonsense_qa", 3)
    choices = original["question"]["choices"]
    row = {
        "question": original["question"]["stem"],
        "choices": {key: [c[key] for c in choices] for key in ("label", "text")},
        "answerKey": original["answerKey"],
    }
    assert rows_of(TASKS["commonsense_qa"], "train", [row]) == [TASKS["commonsense_qa"].item(original, "")]
    coin = {"inputs": "Q: A coin is heads up. Heads?", "targets": "no"}
    assert rows_of(TASKS["coin_flip"], "evaluation", [coin])[0] == Item(
        "Q: A coin is heads up. Heads?\nA: The answer is", "no"
    )
    assert rows_of(TASKS["strategy_qa"], "train", [{"question": "So?", "answer": True}])[0].answer == "yes"


def test_only_rows_with_three_objects_are_taken_from_the_hub_and_cut_by_position() -> None:
    def row(n: int) -> dict[str, Any]:
        names = [f"{i}." for i in range(n)]
        return {
            "inputs": f"Text {n}",
            "multiple_choice_targets": names,
            "multiple_choice_scores": [0] * (n - 1) + [1],
        }

    task = TASKS["object_tracking"]
    found = rows_of(task, "evaluation", [row(3), row(5)] * 10)
    assert [item.answer for item in found] == ["C", "C"]


@pytest.mark.parametrize("name", ["coin_flip", "object_tracking"])
def test_generated_items_depend_on_the_seed_alone_and_never_cross_over(name: str) -> None:
    task = TASKS[name]
    first = items(task, "evaluation", "generated", seed=1)
    assert first == items(task, "evaluation", "generated", seed=1)
    assert first != items(task, "evaluation", "generated", seed=2)
    train = {item.prompt for seed in range(3) for item in items(task, "train", "generated", seed=seed)}
    assert not train & {item.prompt for item in first}
    assert majority_rate(first) < 0.65


def test_generated_answers_are_right() -> None:
    for item in items(TASKS["coin_flip"], "train", "generated")[:50]:
        flips = item.prompt.count(" flips the coin")
        assert item.answer == ("no" if flips % 2 else "yes")
    for item in items(TASKS["object_tracking"], "train", "generated")[:50]:
        assert item.answer == _tracked(item.prompt)


def _tracked(prompt: str) -> str:
    """The answer by following the sentences of the prompt, another way than the generator's."""
    start, *swaps = [s for s in prompt.split("At the start, ")[1].split(". ") if s]
    held = {}
    for clause in start.split("; "):
        name, _, thing = clause.split(" ", 2)
        held[name] = thing
    for sentence in swaps:
        words = sentence.split()
        if words[0].rstrip(",") in ("First", "Then", "Finally"):
            a, b = words[1], words[3]
            held[a], held[b] = held[b], held[a]
    asked = prompt.split(" ...\n")[0].rsplit(", ", 1)[1].split()[0]
    choices = {line[1]: line[4:].rstrip(".") for line in prompt.splitlines() if line.startswith(("(A)", "(B)", "(C)"))}
    return next(letter for letter, thing in choices.items() if thing == held[asked])


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_field_names_file_record_and_field(name: str, tmp_path: Path) -> None:
    lost = {
        "commonsense_qa": "answerKey",
        "svamp": "Body",
        "boolq": "passage",
        "coin_flip": "answer",
        "object_tracking": "input",
        "strategy_qa": "input",
    }[name]
    broken = record(name, 1)
    del broken[lost]
    write(tmp_path, name, [record(name, 0), broken])
    file = FILES[name][1]
    with pytest.raises(WeLoreError, match=f"{file}, record 2: field '{lost}' is missing"):
        items(TASKS[name], "evaluation", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("svamp", {"Answer": "many"}, "must be a number"),
        ("svamp", {"Answer": True}, "must be a int or float or str"),
        ("boolq", {"answer": "yes"}, "must be a bool"),
        ("boolq", {"passage": "  "}, "is empty"),
        ("commonsense_qa", {"answerKey": "F"}, "'F' is no possible answer"),
        ("coin_flip", {"answer": "perhaps"}, "'perhaps' is no possible answer"),
        ("strategy_qa", {"target_scores": {"Yes": 1, "No": 1}}, "marks 2 answers as right"),
    ],
)
def test_a_damaged_field_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeLoreError, match=message):
        TASKS[name].item(record(name, 1) | change, "file, record 1")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("object_tracking", {"multiple_choice_targets": ["a"], "multiple_choice_scores": [1, 0]}),
        ("object_tracking", {"multiple_choice_targets": [["a"]], "multiple_choice_scores": [1]}),
        ("object_tracking", {"target_scores": {str(n): int(n == 11) for n in range(12)}}),
        ("commonsense_qa", {"question": "?", "choices": {"label": ["A"], "text": ["a", "b"]}}),
    ],
)
def test_a_record_of_another_form_is_named(name: str, change: dict[str, Any]) -> None:
    content = {"inputs": "Who?", "question": "Who?", "answerKey": "A"} | change
    if "target_scores" in change:
        content["input"] = "Who?"
    with pytest.raises(WeLoreError, match="file, record 1: it has not the form of"):
        TASKS[name].item(content, "file, record 1")


def test_marks_and_halves_of_pairs_are_no_part_of_a_question(tmp_path: Path) -> None:
    plain = {"Body": "Ann has 2 pears", "Question": "How many?", "Answer": 2}
    odd = plain | {"Body": "\ufeffAnn has 2 pears", "Question": "How \ud83d many?"}
    (tmp_path / "SVAMP.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([odd] * 4).encode())
    assert items(TASKS["svamp"], "evaluation", tmp_path)[0].prompt.startswith("Q: Ann has 2 pears. How \ufffd many?")


def test_the_training_file_is_not_taken_for_evaluation(tmp_path: Path) -> None:
    write(tmp_path, "boolq", [record("boolq", 1)])
    with pytest.raises(WeLoreError, match="training items are never scored"):
        items(TASKS["boolq"], "evaluation", tmp_path / "boolq_train.jsonl")


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    svamp = TASKS["svamp"]
    with pytest.raises(WeLoreError, match="does not exist"):
        items(svamp, "train", tmp_path / "SVAMP.json")
    with pytest.raises(WeLoreError, match="holds no file SVAMP.json"):
        items(svamp, "train", tmp_path)
    (tmp_path / "SVAMP.json").write_text("[")
    with pytest.raises(WeLoreError, match="is not JSON"):
        items(svamp, "train", tmp_path)
    for content in (b"\xff\xfe[\0]\0x", b"[" * 10**6, b"[" + b"1" * 5000 + b"]"):
        (tmp_path / "SVAMP.json").write_bytes(content)
        with pytest.raises(WeLoreError, match=r"SVAMP.json is not JSON in UTF-8") as caught:
            items(svamp, "train", tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "SVAMP.json").write_text("[]")
    with pytest.raises(WeLoreError, match="holds no train items"):
        items(svamp, "train", tmp_path)
    with pytest.raises(WeLoreError, match="svamp cannot be generated, only coin_flip, object_tracking"):
        items(svamp, "train", "generated")
    with pytest.raises(WeLoreError, match="did you mean 'svamp'"):
        choose("task", "swamp", TASKS)


@pytest.mark.parametrize(
    ("name", "n", "majority"),
    [
        ("commonsense_qa", 1221, 0.209),
        ("svamp", 300, 0.077),
        ("boolq", 3270, 0.622),
        ("coin_flip", 150, 0.507),
        ("object_tracking", 150, 0.333),
        ("strategy_qa", 687, 0.508),
    ],
)
def test_original_files_give_the_documented_parts(shared: Path, name: str, n: int, majority: float) -> None:
    found = items(TASKS[name], "evaluation", shared / "tasks")
    assert len(found) == n
    assert majority_rate(found) == pytest.approx(majority, abs=5e-4)
