from pathlib import Path

import numpy as np
import pytest

from toys import trace
from welore.emergence.claims import measured, rank_correlation
from welore.emergence.figures import FIGURES, gradient_cosines, gradient_values, settling
from welore.emergence.trace import Trace
from welore.errors import WeLoreError
from welore.records import Record

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return Trace.load(trace(tmp_path_factory.mktemp("traces") / "trace"))


def record(found: Trace, seed: int) -> Record:
    return Record("pretrain", {"label": None}, {"seed": seed}, measured(found))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_with_its_axes_named(found: Trace, name: str, tmp_path: Path) -> None:
    draw, caption = FIGURES[name]
    figure = draw(found, title="toy $x")
    figure.savefig(tmp_path / "figure.png")
    assert caption.endswith(".")
    words = [ax.get_xlabel() for ax in figure.axes] + [figure._supxlabel.get_text() if figure._supxlabel else ""]
    assert any(words)


def test_panels_are_those_of_the_paper_and_show_the_cosines(found: Trace) -> None:
    figure = gradient_cosines(found)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["layers.0.q_proj", "layers.0.k_proj", "layers.2.down_proj", "layers.2.up_proj"]
    drawn = np.asarray(figure.axes[2].collections[0].get_array())
    wanted = found.matrices["model.layers.2.mlp.down_proj"].same["cosine"]
    assert np.allclose(drawn.reshape(wanted.shape), wanted)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "10", "20", "30", "40", "50"]


def test_values_are_drawn_with_time_downwards_on_one_scale(found: Trace) -> None:
    figure = gradient_values(found)
    panels = figure.axes[:4]
    assert panels[0].yaxis_inverted()
    assert len({(ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) for ax in panels}) == 1


def test_settling_shows_every_matrix_of_every_run_and_the_correlations(found: Trace) -> None:
    figure = settling([record(found, 0), record(found, 1)])
    left = figure.axes[0]
    assert sum(len(line.get_xdata()) for line in left.get_lines()) == 2 * len(found.matrices)
    rows = measured(found)["matrices"]
    value, low, high = rank_correlation(*(np.array([r[k] for r in rows]) for k in ("reduction_ratio", "settles_at")))
    assert f"seed 0: {value:+.2f} [{low:+.2f}, {high:+.2f}]" in left.get_title(loc="left")
    with pytest.raises(WeLoreError, match="no record of a pre-training"):
        settling([])
