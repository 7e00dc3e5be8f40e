"""WeLore: compress any Hugging Face decoder by non-uniform low rank, and load it anywhere transformers does.

The verbs of the command line are functions here; torch and transformers are imported when one is first used.
Importing this package makes `from_pretrained` know compressed checkpoints.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_PUBLIC = {
    "analyze": "welore.compression.analysis",
    "allocate": "welore.allocation.solver",
    "calibrate": "welore.calibration.collect",
    "compress": "welore.compression.pipeline",
    "merge": "welore.compression.merge",
    "evaluate": "welore.evaluation.perplexity",
    "finetune": "welore.training.finetune",
    "score": "welore.evaluation.accuracy",
    "pretrain": "welore.emergence.pretrain",
    "report": "welore.reporting.page",
    "demo": "welore.cli.demo",
    "Spectra": "welore.allocation.spectra",
    "Plan": "welore.allocation.plan",
    "Statistics": "welore.calibration.statistics",
    "Trace": "welore.emergence.trace",
    "Record": "welore.records",
    "LowRankLinear": "welore.layers.low_rank",
    "PivotedLinear": "welore.layers.low_rank",
    "SplitLinear": "welore.layers.low_rank",
    "WeLoreConfig": "welore.models.quantizer",
    "WeLoreError": "welore.errors",
}
__all__ = sorted(_PUBLIC)

_QUANTIZERS = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'welore' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Imports welore.models.quantizer right after transformers' table of quantizers, whoever imports that.

    Registration needs torch and transformers, ten seconds of imports on a small machine; this way `welore --help`
    does not pay for them.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("welore.models.quantizer")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module("welore.models.quantizer")
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
