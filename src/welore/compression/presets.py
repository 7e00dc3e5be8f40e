"""Presets: the settings that `compress` takes for the fields of its config that are None."""

from dataclasses import dataclass, replace

from welore.allocation.rule import LAYOUTS
from welore.allocation.solver import resolve as resolve_allocation
from welore.calibration.scaling import scaling_of
from welore.config import (
    ANYWHERE,
    AUTO,
    CPU,
    GPU,
    KFAC,
    NONE,
    NUM_TOKENS,
    SELF,
    SIZE,
    CalibrationConfig,
    CompressionConfig,
    PresetName,
    Pruning,
    ScalingName,
    StorageName,
    StrategyName,
    settings_of,
)
from welore.errors import WeLoreError, choose


@dataclass(frozen=True)
class Preset:
    """Settings that belong together. None: by the scaling (strategy, storage, split).

    by_device: whether the result is laid out for the device on which the job runs, unless another goal is given.
    """

    scaling: ScalingName = "none"
    strategy: StrategyName | None = None
    storage: StorageName | None = None
    split: bool | None = None
    by_device: bool = False
    mlp_pruning: Pruning = 0.0
    num_tokens: int = NUM_TOKENS
    recovery: bool = False


PRESETS = {
    "best": Preset("kfac", "waterfill", AUTO, by_device=True, mlp_pruning=AUTO, recovery=True),
    "fast": Preset("kfac", "waterfill", AUTO, by_device=True, mlp_pruning=AUTO, num_tokens=4096),
    "paper": Preset("none", "welore", "factored", False),
}
PLAIN = Preset()  # no preset: a plain decomposition, unless a scaling is named


def preset_of(config: CompressionConfig) -> PresetName | None:
    """The preset of a config: the named one, or best for a size alone."""
    if config.preset is not None:
        choose("preset", config.preset, PRESETS)
        return config.preset
    alone = config.keep is not None and config.strategy is None and config.scaling in (None, KFAC)
    return "best" if alone else None


def resolve(config: CompressionConfig, *, has_statistics: bool, device: str = CPU) -> CompressionConfig:
    """The config with every None filled in; WeLoreError for settings that no model could satisfy.

    device: the type of the job's device. has_statistics: whether statistics are given, by which neurons can be chosen
    even if the scaling needs none.
    """
    name = preset_of(config)
    preset = PRESETS.get(name or "", PLAIN)
    scaling: ScalingName = config.scaling or ("kfac" if has_statistics and name is None else preset.scaling)
    goal = config.optimize_for
    if goal == AUTO:
        goal = SIZE if not preset.by_device else CPU if device == CPU else GPU
    if goal == ANYWHERE:
        _require_neurons_alone(config, scaling)
    splits = config.split, preset.split, LAYOUTS[goal].split, scaling_of(scaling).block_split
    pruning = preset.mlp_pruning if config.mlp_pruning is None else config.mlp_pruning
    if pruning == AUTO and scaling == NONE and not has_statistics:
        pruning = 0.0
    assert config.target  # raises unless there is exactly one
    strategy, rule = resolve_allocation(
        replace(config, strategy=config.strategy or preset.strategy, storage=config.storage or preset.storage), scaling
    )
    return replace(
        config,
        preset=name,
        scaling=scaling,
        strategy=strategy,
        storage=rule.storage,
        min_ratio=rule.min_ratio,
        optimize_for=goal,
        split=next(split for split in splits if split is not None),
        mlp_pruning=pruning,
    )


def _require_neurons_alone(config: CompressionConfig, scaling: str) -> None:
    """Raise WeLoreError for settings of a method that factors matrices, where only neurons are taken out."""
    names = "rank_reduction", "threshold", "strategy", "storage", "split", "min_ratio", "mlp_pruning"
    given = [name for name in names if getattr(config, name) is not None]
    given += ["allow_growth"] * config.allow_growth + ["weights"] * (config.weights != AUTO)
    if not given and config.keep is None:
        raise WeLoreError(f"for {ANYWHERE} give keep, or expert_pruning")
    if scaling != KFAC:
        given.append(f"scaling {scaling}" if config.scaling else f"preset {config.preset}")
    if given:
        raise WeLoreError(
            f"for {ANYWHERE} nothing but neurons is taken out, as many as keep says, or experts: leave {given[0]} out"
        )


def resolve_calibration(calibration: CalibrationConfig | None, config: CompressionConfig) -> CalibrationConfig:
    """How statistics are collected; as many tokens as the preset says, unless `calibration` does."""
    given = settings_of(CalibrationConfig, calibration)
    return replace(
        given,
        num_tokens=given.num_tokens or PRESETS.get(config.preset or "", PLAIN).num_tokens,
        measure_losses=0 if given.dataset == SELF else given.measure_losses,  # a quarter of such a text is too little
        split=bool(config.split),
        include=config.include,
        exclude=config.exclude,
    )
