from typing import Any

import pytest

from welore.compression.presets import PRESETS, resolve, resolve_calibration
from welore.config import CalibrationConfig, CompressionConfig, PresetName
from welore.errors import WeLoreError


def settings(config: CompressionConfig, *, has_statistics: bool = False) -> tuple[object, ...]:
    c = resolve(config, has_statistics=has_statistics)
    return c.preset, c.scaling, c.strategy, c.storage, c.split, c.mlp_pruning


def test_a_size_alone_is_the_best_preset() -> None:
    best = ("best", "kfac", "waterfill", "auto", False, "auto")
    assert settings(CompressionConfig(keep=0.8)) == best
    assert settings(CompressionConfig(keep=0.8, optimize_for="size")) == (*best[:4], True, "auto")
    assert settings(CompressionConfig(keep=0.8, scaling="kfac")) == best
    assert settings(CompressionConfig(keep=0.8, preset="best")) == best
    assert settings(CompressionConfig(keep=0.8, preset="fast")) == ("fast", *best[1:])
    assert resolve_calibration(None, resolve(CompressionConfig(keep=0.8, preset="fast"), has_statistics=False)) == (
        CalibrationConfig(num_tokens=4096, measure_losses=0, split=False)
    )


def test_a_number_of_tokens_is_obeyed_also_the_usual_one() -> None:
    fast = resolve(CompressionConfig(keep=0.8, preset="fast"), has_statistics=False)
    for given in (512, 65_536):
        assert resolve_calibration(CalibrationConfig(num_tokens=given), fast).num_tokens == given
    best = resolve(CompressionConfig(keep=0.8), has_statistics=False)
    assert resolve_calibration(None, best).tokens == CalibrationConfig().tokens == 65_536


def test_statistics_that_are_given_decide_the_scaling_unless_a_preset_or_a_scaling_is_named() -> None:
    given = {"has_statistics": True}
    kfac = (None, "kfac", "waterfill", "auto", True, 0.0)
    assert settings(CompressionConfig(rank_reduction=0.3), **given) == kfac
    assert settings(CompressionConfig(rank_reduction=0.3, scaling="none"), **given)[1] == "none"
    assert settings(CompressionConfig(keep=0.8, preset="paper"), **given)[1] == "none"


@pytest.mark.parametrize(("device", "goal"), [("cpu", "cpu"), ("cuda", "gpu"), ("mps", "gpu")])
def test_a_preset_is_laid_out_for_the_device_unless_a_goal_is_named(device: str, goal: str) -> None:
    def goal_of(**options: Any) -> str:
        return resolve(CompressionConfig(keep=0.8, **options), has_statistics=False, device=device).optimize_for

    assert goal_of() == goal_of(preset="fast") == goal
    assert goal_of(preset="paper") == goal_of(strategy="uniform") == "size"
    for named in ("cpu", "gpu", "size"):
        assert goal_of(optimize_for=named) == goal_of(preset="paper", optimize_for=named) == named
    with pytest.raises(WeLoreError, match="unknown goal 'gup'; did you mean 'gpu'"):
        goal_of(optimize_for="gup")


def test_any_other_target_or_method_is_plain_unless_a_scaling_is_named() -> None:
    plain = (None, "none", "welore", "factored", False, 0.0)
    assert settings(CompressionConfig(rank_reduction=0.3)) == plain
    assert settings(CompressionConfig(keep=0.8, strategy="uniform")) == (
        None,
        "none",
        "uniform",
        "factored",
        False,
        0.0,
    )
    assert settings(CompressionConfig(keep=0.8, strategy="waterfill", scaling="kfac")) == (
        (None, "kfac", "waterfill", "auto", True, 0.0)
    )
    assert settings(CompressionConfig(keep=0.8, scaling="asvd")) == (None, "asvd", "waterfill", "auto", False, 0.0)
    assert settings(CompressionConfig(keep=0.8, preset="paper")) == ("paper", "none", "welore", "factored", False, 0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_field_that_is_given_overrides_the_preset(preset: PresetName) -> None:
    config = CompressionConfig(
        keep=0.8, preset=preset, scaling="asvd", strategy="energy", storage="pivoted", split=False, mlp_pruning=0.1
    )
    assert settings(config) == (preset, "asvd", "energy", "pivoted", False, 0.1)
    given = CalibrationConfig(dataset="pydoc", num_tokens=100)
    calibration = resolve_calibration(given, resolve(config, has_statistics=False))
    assert (calibration.num_tokens, calibration.measure_losses) == (100, 0.25)


def test_pruning_without_statistics_is_left_out_or_refused() -> None:
    assert settings(CompressionConfig(keep=0.8, preset="best", scaling="none"))[-1] == 0.0
    assert settings(CompressionConfig(keep=0.8, preset="best", scaling="none"), has_statistics=True)[-1] == "auto"
    with pytest.raises(WeLoreError, match="exactly one target"):
        resolve(CompressionConfig(), has_statistics=False)
    with pytest.raises(WeLoreError, match="unknown preset 'papre'"):
        resolve(CompressionConfig(keep=0.8, preset="papre"), has_statistics=False)  # type: ignore[arg-type]
