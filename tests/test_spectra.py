from pathlib import Path

import numpy as np
import pytest

from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.linalg.spectrum import gaussian_null, normalise
from welore.records import Identity


def test_normalised_spectrum_is_the_min_max_rule() -> None:
    assert normalise(np.array([5.0, 3.0, 2.0, 1.0])).tolist() == [1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("flat", [np.array([3.0]), np.array([2.0, 2.0, 2.0]), np.zeros(4)])
def test_flat_spectrum_has_nothing_to_prune(flat: np.ndarray) -> None:
    assert (normalise(flat) == 1).all()


@pytest.mark.parametrize(("shape", "share"), [((4096, 4096), 0.22), ((4096, 11008), 0.16), ((11008, 4096), 0.16)])
def test_gaussian_null_loses_what_the_paper_models_would(shape: tuple[int, int], share: float) -> None:
    assert (gaussian_null(*shape) < 0.175).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("shape", [(60, 60), (40, 130), (7, 5)])
def test_gaussian_null_is_the_mean_of_random_matrices(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    drawn = [normalise(np.linalg.svd(random.standard_normal(shape), compute_uv=False)) for _ in range(300)]
    # The law is asymptotic: edges fluctuate by k^(-2/3) in a finite matrix.
    assert np.abs(np.mean(drawn, axis=0) - gaussian_null(*shape)).max() < 0.35 * min(shape) ** (-2 / 3)


def some_spectra() -> Spectra:
    values = {"b": np.array([3.0, 1.0]), "a": np.array([2.0, 1.5, 0.1])}
    return Spectra(Identity("m", "f" * 64), values, {"b": (2, 5), "a": (4, 3)}, ("x",), ())


def test_file_gives_back_everything_in_the_order_of_the_model(tmp_path: Path) -> None:
    spectra = some_spectra()
    spectra.save(tmp_path / "s.safetensors")
    again = Spectra.load(tmp_path / "s.safetensors")
    assert (again.model, again.shapes, again.include, again.exclude) == (
        spectra.model,
        spectra.shapes,
        spectra.include,
        spectra.exclude,
    )
    assert list(again.values) == ["b", "a"]
    assert all(np.array_equal(again.values[name], spectra.values[name]) for name in spectra.values)


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match="does not exist"):
        Spectra.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello, this is no safetensors file")
    with pytest.raises(WeLoreError, match="not a readable safetensors file"):
        Spectra.load(tmp_path / "text")


def test_artefact_of_another_model_is_refused() -> None:
    with pytest.raises(WeLoreError, match="the plan was made for another model"):
        Identity("a", "1" * 64).check(Identity("b", "2" * 64), "plan")
