from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import welore
from conftest import build, compress, logits
from welore.config import AllocationConfig
from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer
from welore.layers.storage_forms import FACTORED, FORMS, PIVOTED, StorageForm, cost, form_of


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (9, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_cost_is_the_count_of_the_numbers_in_the_tensors(m: int, n: int, form: str) -> None:
    for r in range(1, min(m, n) + 1):
        shapes = FORMS[form].shapes(m, n, r)
        assert list(shapes) == list(FORMS[form].parts)
        assert FORMS[form].cost(m, n, r) == sum(np.prod(shape) for name, shape in shapes.items() if name != "order")
        assert FORMS[form].check(shapes, r)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_another_rank_or_that_do_not_belong_together_are_noticed(form: str) -> None:
    shapes = FORMS[form].shapes(7, 5, 3)
    assert not FORMS[form].check(shapes, 2)
    for part, shape in shapes.items():
        assert not FORMS[form].check(shapes | {part: (*shape, 1)}, 3)
        if "r" in FORMS[form].parts[part]:
            axes = zip(FORMS[form].parts[part], shape, strict=True)
            longer = tuple(size + 1 if axis == "r" else size for axis, size in axes)
            assert not FORMS[form].check(shapes | {part: longer}, 3)
    if form == PIVOTED:
        assert not FORMS[form].check(shapes | {"order": (8,)}, 3)


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (9, 1)])
def test_pivoted_is_smaller_than_dense_below_full_rank_and_than_factored_always(m: int, n: int) -> None:
    r = np.arange(1, min(m, n) + 1)
    pivoted = FORMS[PIVOTED].cost(m, n, r)
    assert (pivoted[:-1] < m * n).all()
    assert pivoted[-1] == m * n
    assert (pivoted < FORMS[FACTORED].cost(m, n, r)).all()


def test_auto_takes_the_fewer_bytes_with_the_order_counted() -> None:
    for m, n in ((40, 30), (30, 40)):
        for r in range(1, 30):
            factored, pivoted = 2 * r * (m + n), 2 * r * (m + n - r) + 4 * m
            form = PIVOTED if pivoted < factored else FACTORED
            assert form_of(m, n, r, "auto") == form
            assert cost(m, n, r, "auto") == cost(m, n, r, form)
    assert {form_of(40, 30, r, "auto") for r in range(1, 30)} == {FACTORED, PIVOTED}


def test_unknown_storage_names_the_known_ones() -> None:
    with pytest.raises(WeLoreError, match="unknown storage 'pivotted'; did you mean 'pivoted'"):
        form_of(7, 5, 3, "pivotted")


class ScaledLinear(LowRankLayer):
    """y = A (s * (B x)) + b: the form that `test_a_new_form_is_one_object` makes up."""

    form = "scaled"

    def __init__(self, in_features: int, out_features: int, rank: int, **options: object) -> None:
        super().__init__(in_features, out_features, rank, **options)
        options.pop("bias", None)
        self.A, self.B = nn.Linear(rank, out_features, False, **options), nn.Linear(in_features, rank, False, **options)
        self.scale = nn.Parameter(torch.ones(rank, **options))

    @staticmethod
    def pack(A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        scale = A.norm(dim=0) + 1
        return A / scale, scale, B

    @staticmethod
    def unpack(*parts: Tensor) -> Tensor:
        A, scale, B = parts
        return (A * scale).float() @ B.float()

    def forward(self, x: Tensor) -> Tensor:
        y = self.A(self.B(x) * self.scale)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_form_is_one_object(family: str, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"A.weight": ("m", "r"), "scale": ("r",), "B.weight": ("r", "n")}
    scaled = StorageForm("scaled", "A (m, r), s (r,) and B (r, n)", f"{__name__}:ScaledLinear", parts)
    monkeypatch.setitem(FORMS, "scaled", scaled)
    build(family).save_pretrained(tmp_path / "dense")
    settings = AllocationConfig(rank_reduction=0.4, storage="scaled")  # type: ignore[arg-type]
    plan = welore.allocate(welore.analyze(tmp_path / "dense"), settings)
    plan.save(tmp_path / "plan.json")
    assert set(welore.Plan.load(tmp_path / "plan.json").forms.values()) == {"scaled"}
    m, n = (a := next(a for a in plan.allocations if a.factored)).shape
    assert a.stored_parameters == a.rank * (m + n + 1)

    compress(tmp_path / "dense", tmp_path / "small", plan=welore.Plan.load(tmp_path / "plan.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {type(model.get_submodule(name)) for name in plan.ranks} == {ScaledLinear}
    welore.merge(tmp_path / "small", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model, tokens), logits(merged, tokens), rtol=1e-4, atol=1e-4)
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    compress(in_memory, plan=plan)
    assert torch.equal(logits(in_memory, tokens), logits(model, tokens))
