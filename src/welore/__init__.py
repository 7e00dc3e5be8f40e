"""WeLore: compress any Hugging Face decoder by non-uniform low rank, and load it anywhere transformers does.

Every verb of the command line is a function here. torch and transformers are imported when one is first used.
Importing this package makes `from_pretrained` know compressed checkpoints.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from welore.allocation.plan import Plan
    from welore.allocation.solver import allocate
    from welore.allocation.spectra import Spectra
    from welore.calibration.collect import calibrate
    from welore.calibration.statistics import Statistics
    from welore.cli.demo import demo
    from welore.compression.analysis import analyze
    from welore.compression.estimate import Estimate, estimate
    from welore.compression.export import export
    from welore.compression.info import CheckpointInfo, info
    from welore.compression.merge import merge
    from welore.compression.pipeline import compress
    from welore.compression.result import CompressionResult
    from welore.config import (
        AllocationConfig,
        CalibrationConfig,
        CompressionConfig,
        EvaluationConfig,
        FinetuneConfig,
        PretrainConfig,
        RecoveryConfig,
        ScoreConfig,
    )
    from welore.emergence.pretrain import pretrain
    from welore.emergence.trace import Trace
    from welore.errors import WeLoreError
    from welore.evaluation.accuracy import score
    from welore.evaluation.lm_eval import evaluate_tasks
    from welore.evaluation.perplexity import evaluate
    from welore.layers.low_rank import LowRankLinear, PivotedLinear, SplitLinear, optimize_for_decoding
    from welore.models.quantizer import WeLoreConfig
    from welore.records import Record
    from welore.reporting.page import report
    from welore.training.finetune import finetune
    from welore.training.methods import MarkedModel, lora_targets, mark_trainable, optimizer_groups

__all__ = [
    "AllocationConfig",
    "CalibrationConfig",
    "CheckpointInfo",
    "CompressionConfig",
    "CompressionResult",
    "Estimate",
    "EvaluationConfig",
    "FinetuneConfig",
    "LowRankLinear",
    "MarkedModel",
    "PivotedLinear",
    "Plan",
    "PretrainConfig",
    "Record",
    "RecoveryConfig",
    "ScoreConfig",
    "Spectra",
    "SplitLinear",
    "Statistics",
    "Trace",
    "WeLoreConfig",
    "WeLoreError",
    "allocate",
    "analyze",
    "calibrate",
    "compress",
    "demo",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "export",
    "finetune",
    "info",
    "lora_targets",
    "mark_trainable",
    "merge",
    "optimize_for_decoding",
    "optimizer_groups",
    "pretrain",
    "report",
    "score",
]

# Module -> the names that are read from it on first use; the same as above, for the interpreter.
_LAZY = {
    "allocation.plan": ["Plan"],
    "allocation.solver": ["allocate"],
    "allocation.spectra": ["Spectra"],
    "calibration.collect": ["calibrate"],
    "calibration.statistics": ["Statistics"],
    "cli.demo": ["demo"],
    "compression.analysis": ["analyze"],
    "compression.estimate": ["Estimate", "estimate"],
    "compression.export": ["export"],
    "compression.info": ["CheckpointInfo", "info"],
    "compression.merge": ["merge"],
    "compression.pipeline": ["compress"],
    "compression.result": ["CompressionResult"],
    "config": [
        "AllocationConfig",
        "CalibrationConfig",
        "CompressionConfig",
        "EvaluationConfig",
        "FinetuneConfig",
        "PretrainConfig",
        "RecoveryConfig",
        "ScoreConfig",
    ],
    "emergence.pretrain": ["pretrain"],
    "emergence.trace": ["Trace"],
    "errors": ["WeLoreError"],
    "evaluation.accuracy": ["score"],
    "evaluation.lm_eval": ["evaluate_tasks"],
    "evaluation.perplexity": ["evaluate"],
    "layers.low_rank": ["LowRankLinear", "PivotedLinear", "SplitLinear", "optimize_for_decoding"],
    "models.quantizer": ["WeLoreConfig"],
    "records": ["Record"],
    "reporting.page": ["report"],
    "training.finetune": ["finetune"],
    "training.methods": ["MarkedModel", "lora_targets", "mark_trainable", "optimizer_groups"],
}
_MODULE_OF = {name: f"welore.{module}" for module, names in _LAZY.items() for name in names}


if not TYPE_CHECKING:  # for which a name that is not there has to be an error

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'welore' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__


_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterWithTransformers:
    """Imports welore.models.quantizer right after transformers' table of quantizers, whoever imports that.

    Registration needs torch and transformers, ten seconds of imports on a small machine; this way `welore --help`
    does not pay for them. An import of transformers that fails leaves the hook in place for the next one.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                importlib.import_module("welore.models.quantizer")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module("welore.models.quantizer")
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
