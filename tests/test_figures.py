"""Promises of the figures, checked on the drawing's own objects; how they look is for eyes."""

import re
import subprocess
import sys
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

from conftest import allocate
from welore.allocation.plan import Allocation, Plan
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.layers.remaining import Remaining
from welore.linalg.spectrum import gaussian_null
from welore.records import Identity
from welore.reporting import figures
from welore.reporting.formatting import perplexity_text
from welore.reporting.module_types import module_positions, summarise
from welore.reporting.style import N_LRC
from welore.reporting.tables import Result

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

LLAMA = {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (5, 8), "mlp.down_proj": (8, 13)}
GPT2 = {"attn.c_attn": (12, 4), "attn.c_proj": (4, 4), "mlp.c_proj": (4, 7)}


def make(shapes: dict[str, tuple[int, int]], fingerprint: str = "f" * 64) -> Spectra:
    """Spectra that fall faster or slower from matrix to matrix, so that a plan has LRCs and N-LRCs."""
    values = {}
    for i, (name, shape) in enumerate(shapes.items()):
        position = np.linspace(0, 1, min(shape))
        values[name] = 3 * (1 - position) ** (0.4 + 3.0 * (i % 3)) + 0.1
    return Spectra(Identity("org/tiny", fingerprint), values, shapes)


def blocks(kinds: dict[str, tuple[int, int]], layers: int = 3, prefix: str = "model.layers") -> Spectra:
    return make({f"{prefix}.{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()})


def drawn(figure: Figure) -> Figure:
    figure.savefig(BytesIO(), format="png", dpi=40)
    return figure


def panels(figure: Figure) -> dict[str, Axes]:
    return {ax.get_title() or ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}


@pytest.fixture
def spectra() -> Spectra:
    return blocks(LLAMA)


@pytest.fixture
def plan(spectra: Spectra) -> Plan:
    return allocate(spectra, threshold=0.3)


def test_kind_is_the_name_without_the_layer_and_as_short_as_it_can_be() -> None:
    names = ["h.0.attn.c_proj", "h.1.mlp.c_proj", "h.1.mlp.c_fc", "h.1.moe.0.w", "h.1.moe.1.w", "lm_head"]
    found = {name: (position.module_type, position.layer) for name, position in module_positions(names).items()}
    assert found == {
        "h.0.attn.c_proj": ("attn.c_proj", 0),
        "h.1.mlp.c_proj": ("mlp.c_proj", 1),
        "h.1.mlp.c_fc": ("c_fc", 1),
        "h.1.moe.0.w": ("moe.0.w", 1),
        "h.1.moe.1.w": ("moe.1.w", 1),
        "lm_head": ("lm_head", None),
    }


def test_a_kind_that_ends_another_kind_stays_distinct() -> None:
    found = module_positions(["layers.0.proj", "layers.0.out.proj", "encoder.layers.0.q", "decoder.layers.0.q"])
    assert len({position.module_type for position in found.values()}) == 4


def test_spectra_has_a_panel_per_kind_a_line_per_layer_and_the_plans_threshold(spectra: Spectra, plan: Plan) -> None:
    shown = panels(drawn(figures.normalised_spectra(spectra, plan, title="tiny")))
    for kind, (m, n) in LLAMA.items():
        lines = shown[kind.split(".")[-1]].lines
        assert len(lines) == 3 + 1 + 1  # layers, null, threshold
        threshold = [line for line in lines if "threshold" in str(line.get_label())]
        assert [list(np.unique(line.get_ydata())) for line in threshold] == [[plan.threshold]]
        null = next(line for line in lines if line.get_linestyle() == "--")
        np.testing.assert_allclose(null.get_ydata(), gaussian_null(m, n))
    first = shown["q_proj"].lines[0]
    np.testing.assert_allclose(first.get_ydata(), spectra.normalised()["model.layers.0.self_attn.q_proj"])
    np.testing.assert_allclose(first.get_xdata(), (np.arange(8) + 0.5) / 8)


def test_a_long_spectrum_is_thinned_but_stays_on_its_curve() -> None:
    spectra = make({"layers.0.q": (900, 1000), "layers.1.q": (900, 1000)})
    line = figures.normalised_spectra(spectra).axes[0].lines[1]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    s = spectra.normalised()["layers.1.q"]
    assert len(x) < 80
    assert (y[0], y[-1]) == (1, 0)
    assert np.abs(np.interp((np.arange(900) + 0.5) / 900, x, y) - s).max() < 0.01


def test_threshold_of_another_strategy_is_not_drawn_over_normalised_values(spectra: Spectra) -> None:
    plan = allocate(spectra, keep=0.8, strategy="uniform")
    labels = [line.get_label() for ax in figures.normalised_spectra(spectra, plan).axes for line in ax.lines]
    assert not [label for label in labels if "threshold" in str(label)]


def test_spectra_of_another_model_are_refused(plan: Plan) -> None:
    with pytest.raises(WeLoreError, match="made for another model"):
        figures.normalised_spectra(make(LLAMA, fingerprint="0" * 64), plan)


def test_every_dense_matrix_is_hatched_and_no_lrc_is(plan: Plan) -> None:
    ax = drawn(figures.reduction_heatmap(plan)).axes[0]
    (hatched,) = [c for c in ax.collections if c.get_gid() == N_LRC]
    assert hatched.get_hatch()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    cells = {(rows[int(box.y0)], int(box.x0)) for box in (path.get_extents() for path in hatched.get_paths())}
    positions = module_positions(a.name for a in plan.allocations)
    dense = {(positions[a.name].module_type, positions[a.name].layer) for a in plan.allocations if not a.factored}
    assert cells == dense
    assert 0 < len(dense) < len(plan.allocations)


def test_neurons_that_are_gone_have_a_row_of_their_own(plan: Plan) -> None:
    mlp = next(a.name for a in plan.allocations if a.name.endswith("down_proj")).rpartition(".")[0]
    ax = drawn(figures.reduction_heatmap(replace(plan, neurons={mlp: Remaining(13, tuple(range(10)))}))).axes[0]
    mesh = next(c.get_array() for c in ax.collections if c.get_array() is not None)
    assert mesh is not None
    assert ax.get_yticklabels()[-1].get_text() == "neurons out"
    assert mesh[-1].tolist() == pytest.approx([3 / 13, *([0] * (mesh.shape[1] - 1))])
    assert drawn(figures.reduction_heatmap(plan)).axes[0].get_yticklabels()[-1].get_text() != "neurons out"


def test_experts_that_are_gone_have_a_row_of_their_own(plan: Plan) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (1, 2)]
    names += [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]  # the last layer has no experts
    allocations = tuple(Allocation(name, (8, 8), 2, True, 0.0) for name in names)
    experts = {
        f"model.layers.{layer}.mlp.experts": Remaining(4, left) for layer, left in enumerate([(0, 1, 2), (0, 2)])
    }
    neurons = {"model.layers.1.mlp.experts.2": Remaining(10, tuple(range(8)))}
    mixture = replace(plan, strategy="uniform", allocations=allocations, experts=experts, neurons=neurons)
    ax = drawn(figures.reduction_heatmap(mixture)).axes[0]
    mesh = next(c.get_array() for c in ax.collections if c.get_array() is not None)
    assert mesh is not None
    assert [label.get_text() for label in ax.get_yticklabels()][-2:] == ["neurons out", "experts out"]
    assert mesh[-2].tolist() == pytest.approx([0, 0.2, 0])
    assert mesh[-1].tolist() == [0.25, 0.5, None]


def test_experts_share_a_cell_that_is_hatched_if_all_of_them_stay_dense(plan: Plan) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(2) for expert in range(2)]
    ranks = dict(zip(names, (2, 8, 8, 8), strict=True))  # of 8: an expert of the first layer is factored
    allocations = tuple(Allocation(f"{n}.up_proj", (8, 8), rank, rank < 8, 0.0) for n, rank in ranks.items())
    gone = {name: Remaining(10, tuple(range(10 - number))) for number, name in enumerate(names)}
    ax = drawn(
        figures.reduction_heatmap(replace(plan, strategy="uniform", allocations=allocations, neurons=gone))
    ).axes[0]
    mesh = next(c.get_array() for c in ax.collections if c.get_array() is not None)
    assert mesh is not None
    assert mesh[0].tolist() == pytest.approx([0.75 / 2, 0.0])
    assert mesh[1].tolist() == pytest.approx([0.1 / 2, 0.5 / 2])
    (hatched,) = [c for c in ax.collections if c.get_gid() == N_LRC]
    assert [int(path.get_extents().x0) for path in hatched.get_paths()] == [1]


def test_heat_map_shows_each_reduction_ratio_and_the_nulls_share(plan: Plan) -> None:
    ax = drawn(figures.reduction_heatmap(plan)).axes[0]
    mesh, null = [c.get_array() for c in ax.collections if c.get_array() is not None]
    assert mesh is not None
    assert null is not None
    rows = [label.get_text() for label in ax.get_yticklabels()]
    positions = module_positions(a.name for a in plan.allocations)
    for a in plan.allocations:
        assert mesh[rows.index(positions[a.name].module_type), positions[a.name].layer] == a.reduction_ratio
    assert null[rows.index("down_proj"), 0] == np.mean(gaussian_null(8, 13) < plan.threshold)
    assert {c.get_clim() for c in ax.collections if c.get_array() is not None} == {(0, 1)}


def test_null_column_is_for_welore_plans_only(spectra: Spectra) -> None:
    ax = figures.reduction_heatmap(allocate(spectra, keep=0.8, strategy="uniform")).axes[0]
    assert "Gaussian\nnull" not in [label.get_text() for label in ax.get_xticklabels()]


def test_bars_are_millions_of_parameters_with_their_ratio(spectra: Spectra) -> None:
    plan = allocate(spectra, rank_reduction=0.2, strategy="uniform", allow_growth=True)
    ax = drawn(figures.parameters_by_module(plan)).axes[0]
    heights = [bar.get_height() * 1e6 for bar in ax.patches]
    kinds = summarise(plan)
    assert heights == pytest.approx([k.dense_parameters for k in kinds] + [k.stored_parameters for k in kinds])
    assert sum(heights[3:]) / sum(heights[:3]) == pytest.approx(plan.parameter_ratio)
    assert [t.get_text() for t in ax.texts] == [f"{100 * k.parameter_ratio:.0f} %" for k in kinds]
    assert plan.parameter_ratio > 1  # growth is shown, not clipped
    assert ax.get_ylim()[1] > max(bar.get_height() for bar in ax.patches)


def result(name: str, strategy: str, perplexity: float | None) -> Result:
    return Result(name, strategy, 0.37, 0.794, 427_000_000, perplexity)


def test_every_perplexity_is_written_beside_its_point() -> None:
    texts = {
        "wikitext2": [result("d", "dense", 30.19), result("w", "welore", 3.9e4), result("u", "uniform", None)],
        "pydoc": [result("d", "dense", 14.25), result("$w$ \\frac", "welore", 2.6e6)],
    }
    figure = drawn(figures.perplexities(texts))
    shown = panels(figure)
    assert [t.get_text() for t in shown["wikitext2"].texts] == ["30.19", "39,000", "not finite"]
    assert [t.get_text() for t in shown["pydoc"].texts] == ["14.25", "2.6e6"]
    assert shown["pydoc"].get_xscale() == "log"
    label = shown["wikitext2"].get_yticklabels()[1].get_text()
    assert label == "w\nwelore: ERR 37.0 %, parameters 79.4 %, 427.0 MB"
    low, high = shown["pydoc"].get_xlim()
    assert low < 14.25 < 2.6e6 < high


def test_a_strategy_has_one_colour_in_all_panels() -> None:
    texts = {"a": [result("x", "welore", 20.0)], "b": [result("d", "dense", 9.0), result("x", "welore", 30.0)]}
    shown = panels(figures.perplexities(texts))
    assert shown["a"].lines[0].get_color() == shown["b"].lines[-1].get_color()
    assert to_hex(shown["b"].lines[0].get_color()) == "#000000"


@pytest.mark.parametrize("values", [[14.25], [1.0, 1e304], [14.0, 14.1], [30.0, 60.0, 130.0], [1.0, 1e9]])
def test_any_range_of_perplexities_has_labelled_ticks(values: list[float]) -> None:
    figure = drawn(figures.perplexities({"text": [result(str(v), "welore", v) for v in values]}))
    ax = figure.axes[0]
    low, high = ax.get_xlim()
    assert low < min(values) <= max(values) < high
    assert len([t for t in ax.get_xticks() if low <= t <= high]) >= 2


def test_no_finite_perplexity_is_said() -> None:
    with pytest.raises(WeLoreError, match="no result has a finite perplexity"):
        figures.perplexities({"text": [result("u", "uniform", None)]})


@pytest.mark.parametrize(
    "spectra",
    [
        blocks(GPT2, layers=1, prefix="transformer.h"),
        blocks({"w": (1, 5)}, layers=2),
        make({"lm_head": (7, 5)}),
        make({"layers.0.q": (5, 7), "layers.7.k": (7, 5), "lm_head": (9, 5)}),
        blocks({f"moe.{e}.up$_{e}": (6, 5) for e in range(9)}, layers=33),
    ],
    ids=["one layer", "rank one", "no layer", "holes", "many"],
)
def test_odd_models_are_drawn_whole(spectra: Spectra) -> None:
    plan = allocate(spectra, threshold=0.4)
    for figure in (
        figures.normalised_spectra(spectra, plan, title="a $title"),
        figures.reduction_heatmap(plan),
        figures.parameters_by_module(plan),
    ):
        drawn(figure)
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


@pytest.mark.parametrize(
    ("value", "text"), [(30.19, "30.19"), (1836.62, "1,837"), (5.4e6, "5.4e6"), (None, "not finite")]
)
def test_perplexities_are_written_with_the_figures_that_mean_something(value: float | None, text: str) -> None:
    assert perplexity_text(value) == text


def test_sizes_always_stand_together() -> None:
    assert re.search("ERR .*parameters .*MB", result("w", "welore", 1.0).size)


def test_neither_figures_nor_report_import_torch_or_transformers() -> None:
    code = (
        "import sys, welore.reporting.figures, welore.reporting.page;"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_missing_matplotlib_is_one_sentence(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(WeLoreError, match=re.escape("pip install 'welore[report]'")):
        figures.reduction_heatmap(plan)
