"""On the embedded 135M model: what must be true of a real one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import welore
from conftest import allocate, compress, logits
from welore.linalg.spectrum import normalise
from welore.linalg.svd import factorise
from welore.models.source import CheckpointSource

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> dict[str, np.ndarray]:
    """Singular values of every targeted matrix by numpy's float64 SVD."""
    weights = CheckpointSource(smollm2)
    return {t.name: np.linalg.svd(weights.read(t).double().numpy(), compute_uv=False) for t in weights.targets}


@pytest.mark.slow
def test_every_rank_equals_a_float64_reference(
    smollm2_spectra: welore.Spectra, reference: dict[str, np.ndarray]
) -> None:
    assert len(reference) == 210
    for settings in ({"rank_reduction": 0.09}, {"rank_reduction": 0.5}, {"keep": 0.8}, {"threshold": 0.175}):
        plan = allocate(smollm2_spectra, **settings)
        for a in plan.allocations:
            assert a.rank == int((normalise(reference[a.name]) >= plan.threshold).sum())


def test_factors_of_a_real_layer_reach_the_optimum(smollm2: Path, reference: dict[str, np.ndarray]) -> None:
    weights = CheckpointSource(smollm2, include=["layers.0"])
    for target in weights.targets:
        sigma = reference[target.name]
        for rank in (8, min(target.shape) // 2):
            W = weights.read(target)
            found = factorise(W, rank)
            error = torch.linalg.matrix_norm(W.double() - found.A.double() @ found.B.double()).item()
            assert error <= np.sqrt((sigma[rank:] ** 2).sum()) * (1 + 1e-6)


@pytest.mark.slow
def test_compressed_and_merged_agree_and_nothing_is_lost(
    smollm2: Path, smollm2_spectra: welore.Spectra, tmp_path: Path
) -> None:
    plan = allocate(smollm2_spectra, rank_reduction=0.3)
    record = compress(smollm2, tmp_path / "small", plan=plan)
    assert record.numbers["bytes"] < 0.92 * record.numbers["bytes_dense"]
    welore.merge(tmp_path / "small", tmp_path / "dense")
    ids = torch.arange(1000, 1064)[None]
    small, dense = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / n), ids) for n in ("small", "dense"))
    assert torch.isfinite(small).all()
    assert (small - dense).abs().max() < 1e-3 * small.abs().max()


@pytest.mark.slow
def test_bfloat16_copy_is_compressed_like_its_float32_values(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    record = compress(tmp_path / "bf16", tmp_path / "small", rank_reduction=0.3, include=["layers.1?"])
    model.float().save_pretrained(tmp_path / "fp32")
    wider = compress(tmp_path / "fp32", tmp_path / "wide", rank_reduction=0.3, include=["layers.1?"])
    ranks = [welore.Plan.load(tmp_path / name / "plan.json").ranks for name in ("small", "wide")]
    assert ranks[0] == ranks[1]
    assert record.inputs["targets_fingerprint"] == wider.inputs["targets_fingerprint"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16
