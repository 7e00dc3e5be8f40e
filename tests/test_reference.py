from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import welore
from conftest import build, logits
from welore.compression.reference_import import import_checkpoint, import_singular_values
from welore.errors import WeLoreError


def linear_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> W (m, n) of every linear layer of the decoder blocks."""
    return {
        name: layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and name != "lm_head"
    }


# --- singular values ----------------------------------------------------------------------------------------------


def reference_values(key: Callable[[str], Any] = int) -> dict[Any, dict[str, Tensor]]:
    """What the scripts save: layer -> {"self_attn.q_proj": singular values by numpy, ...}."""
    values: dict[Any, dict[str, Tensor]] = {}
    for name, W in linear_layers(build("llama")).items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
        values.setdefault(key(layer), {})[kind] = torch.from_numpy(sigma)
    return values


@pytest.mark.parametrize("key", [int, str])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_imported_values_give_the_plan_that_analyze_gives(
    saved: Callable[..., Path], tmp_path: Path, key: Callable[[str], Any], dtype: torch.dtype
) -> None:
    content = {layer: {k: v.to(dtype) for k, v in kinds.items()} for layer, kinds in reference_values(key).items()}
    torch.save(content, tmp_path / "values.pt")
    imported, own = import_singular_values(tmp_path / "values.pt", saved()), welore.analyze(saved())
    assert imported.model == own.model
    assert imported.shapes == own.shapes
    assert list(imported.values) == list(own.values)
    for rank_reduction in (0.1, 0.3, 0.5):
        ours, theirs = (welore.allocate(spectra, rank_reduction=rank_reduction) for spectra in (own, imported))
        assert ours.ranks == theirs.ranks
        assert ours.ranks
        assert [a.rank for a in ours.allocations] == [a.rank for a in theirs.allocations]


def test_order_of_the_values_does_not_matter(saved: Callable[..., Path], tmp_path: Path) -> None:
    content = reference_values()
    content[0]["self_attn.q_proj"] = content[0]["self_attn.q_proj"].flip(0)
    torch.save(content, tmp_path / "values.pt")
    sigma = import_singular_values(tmp_path / "values.pt", saved()).values["model.layers.0.self_attn.q_proj"]
    assert (np.diff(sigma) <= 0).all()


def test_only_the_included_modules_need_values(saved: Callable[..., Path], tmp_path: Path) -> None:
    content = {layer: {"mlp.up_proj": kinds["mlp.up_proj"]} for layer, kinds in reference_values().items()}
    torch.save(content, tmp_path / "values.pt")
    spectra = import_singular_values(tmp_path / "values.pt", saved(), include=["up_proj"])
    assert list(spectra.values) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert spectra.include == ("up_proj",)


def drop_layer(content: dict[Any, Any]) -> None:
    del content[1]


def drop_matrix(content: dict[Any, Any]) -> None:
    del content[1]["self_attn.q_proj"]


def replace_by_list(content: dict[Any, Any]) -> None:
    content[1]["self_attn.q_proj"] = [3.0, 2.0, 1.0]


def shorten(content: dict[Any, Any]) -> None:
    content[1]["self_attn.q_proj"] = content[1]["self_attn.q_proj"][:-1]


def spoil(content: dict[Any, Any]) -> None:
    content[1]["self_attn.q_proj"][4] = torch.nan


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop_layer, "no singular values of layer 1, self_attn.q_proj"),
        (drop_matrix, "no singular values of layer 1, self_attn.q_proj"),
        (replace_by_list, "no singular values of layer 1, self_attn.q_proj"),
        (shorten, "layer 1, self_attn.q_proj has 31 values, not 32"),
        (spoil, "layer 1, self_attn.q_proj has NaN or Inf among its values"),
    ],
)
def test_values_that_do_not_fit_the_model_are_named(
    saved: Callable[..., Path], tmp_path: Path, change: Callable[[dict[Any, Any]], None], sentence: str
) -> None:
    content = reference_values()
    change(content)
    torch.save(content, tmp_path / "values.pt")
    with pytest.raises(WeLoreError, match=sentence):
        import_singular_values(tmp_path / "values.pt", saved())


# --- state dict ---------------------------------------------------------------------------------------------------

RANK = 5
LRCS = ("q_proj", "gate_proj", "c_attn", "c_fc")


def reference_checkpoint(family: str, **changes: Any) -> tuple[dict[str, Tensor], PreTrainedModel, dict[str, int]]:
    """A state dict whose LRCs are random U (m, r) and V (r, n); the dense model with W = U V; the ranks."""
    model = build(family, **changes)
    state, ranks = dict(model.state_dict()), {}
    random = torch.Generator().manual_seed(0)
    for name, W in linear_layers(model).items():
        if not name.endswith(LRCS):
            continue
        m, n = W.shape
        U, V = (torch.randn(shape, generator=random) / 4 for shape in ((m, RANK), (RANK, n)))
        del state[f"{name}.weight"]
        state |= {f"{name}.U.weight": U, f"{name}.V.weight": V}
        layer = model.get_submodule(name)
        layer.weight.data = (U.double() @ V.double()).float()
        if isinstance(layer, Conv1D):
            layer.weight.data = layer.weight.data.T.contiguous()
        ranks[name] = RANK
    return state, model, ranks


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {}), ("gpt2", {})],
    ids=["plain", "bias", "tied", "transposed"],
)
def test_imported_checkpoint_computes_what_its_factors_say(
    tmp_path: Path, tokens: Tensor, family: str, changes: dict[str, Any]
) -> None:
    state, dense, ranks = reference_checkpoint(family, **changes)
    torch.save(state, tmp_path / "lrc.pt")
    build(family, **changes).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # the weights are those of the state dict

    record = import_checkpoint(tmp_path / "lrc.pt", tmp_path / "model", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), atol=1e-4, rtol=1e-4)
    assert model.config.quantization_config.ranks == ranks
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ranks:
        assert torch.equal(stored[f"{name}.A.weight"], state[f"{name}.U.weight"])
        assert torch.equal(stored[f"{name}.B.weight"], state[f"{name}.V.weight"])
    assert welore.Record.load(tmp_path / "out" / "compression.json") == record


def test_numbers_of_an_import_equal_a_recount(saved: Callable[..., Path], tmp_path: Path) -> None:
    state, model, ranks = reference_checkpoint("llama")
    torch.save(state, tmp_path / "lrc.pt")
    numbers = import_checkpoint(tmp_path / "lrc.pt", saved(), tmp_path / "out").numbers
    shapes = {name: tuple(W.shape) for name, W in linear_layers(model).items()}
    stored = sum(
        state[f"{name}.U.weight"].numel() + state[f"{name}.V.weight"].numel() if name in ranks else m * n
        for name, (m, n) in shapes.items()
    )
    assert numbers["parameter_ratio"] == stored / sum(m * n for m, n in shapes.values())
    assert numbers["rank_reduction"] == sum(min(shapes[name]) - RANK for name in ranks) / sum(map(min, shapes.values()))
    assert (numbers["matrices"], numbers["lrcs"]) == (14, 4)
    assert numbers["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def lose(state: dict[str, Tensor]) -> None:
    del state["model.norm.weight"]


def lose_factor(state: dict[str, Tensor]) -> None:
    del state["model.layers.0.self_attn.q_proj.V.weight"]


def narrow_factor(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.V.weight"] = torch.ones(RANK, 31)


def disagree(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.V.weight"] = torch.ones(RANK + 1, 32)


def reshape(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(7)


def spoil_factor(state: dict[str, Tensor]) -> None:
    state["model.layers.1.self_attn.q_proj.U.weight"][3, 3] = torch.inf


def store_as_integers(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(32, dtype=torch.int8)


def store_sparse(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(32).to_sparse()


def store_nothing(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(32, device="meta")


def grow(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.U.weight"] = torch.ones(32, 40)
    state["model.layers.0.self_attn.q_proj.V.weight"] = torch.ones(40, 32)


def flatten_factor(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.U.weight"] = torch.tensor(1.0)


QV = "model.layers.0.self_attn.q_proj.V.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lose, "has neither model.norm.weight nor its factors"),
        (lose_factor, f"has neither model.layers.0.self_attn.q_proj.weight nor its factors .*{QV}"),
        (narrow_factor, rf"{QV} has shape \(5, 31\), the model needs \(5, 32\)"),
        (disagree, rf"{QV} has shape \(6, 32\), the model needs \(5, 32\)"),
        (reshape, r"model.norm.weight has shape \(7,\), the model needs \(32,\)"),
        (store_as_integers, "model.norm.weight is no dense tensor of float numbers"),
        (store_sparse, "model.norm.weight is no dense tensor of float numbers"),
        (store_nothing, "model.norm.weight is no dense tensor of float numbers"),
        (grow, "q_proj has rank 40, .* from 1 to 32"),
        (flatten_factor, r"q_proj.U.weight has shape \(\)"),
        (spoil_factor, "model.layers.1.self_attn.q_proj.A.weight holds NaN or Inf"),
    ],
)
def test_state_dict_that_does_not_fit_is_named_and_nothing_is_written(
    saved: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    state, _, _ = reference_checkpoint("llama")
    change(state)
    torch.save(state, tmp_path / "lrc.pt")
    model = saved()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeLoreError, match=sentence):
        import_checkpoint(tmp_path / "lrc.pt", model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_import_never_replaces_the_model_it_reads(saved: Callable[..., Path], tmp_path: Path) -> None:
    state, _, _ = reference_checkpoint("llama")
    torch.save(state, tmp_path / "lrc.pt")
    model = saved()
    weights = (model / "model.safetensors").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(WeLoreError, match="is or holds .*, which is read"):
            import_checkpoint(tmp_path / "lrc.pt", model, model, overwrite=overwrite)
    assert (model / "model.safetensors").read_bytes() == weights


# --- nothing is unpickled freely -------------------------------------------------------------------------------------


class Bomb:
    """An object whose pickle calls Path.touch when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("verb", ["values", "checkpoint"])
def test_code_in_a_file_is_refused_and_never_run(saved: Callable[..., Path], tmp_path: Path, verb: str) -> None:
    trace, file, model = tmp_path / "trace", tmp_path / "file.pt", saved()
    torch.save({0: reference_values()[0], "bomb": Bomb(trace)}, file)
    with pytest.raises(WeLoreError, match=r"file\.pt is not a torch file of plain tensors") as caught:
        if verb == "values":
            import_singular_values(file, model)
        else:
            import_checkpoint(file, model, tmp_path / "out")
    assert not trace.exists()
    assert "can still be loaded" not in str(caught.value), "torch's hint to unpickle it after all"
    torch.load(file, weights_only=False)
    assert trace.exists(), "the bomb of this test is a dud"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04 no archive", b"\x80\x02}q\x00."])
def test_file_of_something_else_is_one_sentence(saved: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(WeLoreError, match=r"file\.pt is not a torch file of plain tensors") as caught:
        import_singular_values(tmp_path / "file.pt", saved())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_torch_file_that_is_cut_off_is_one_sentence(saved: Callable[..., Path], tmp_path: Path, share: float) -> None:
    torch.save({0: torch.ones(3000)}, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeLoreError, match=r"file\.pt is not a torch file of plain tensors"):
        import_singular_values(tmp_path / "file.pt", saved())


def test_singular_values_that_are_no_floats_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    values = reference_values()
    values[1]["mlp.up_proj"] = values[1]["mlp.up_proj"].to(torch.complex64)
    torch.save(values, tmp_path / "file.pt")
    with pytest.raises(WeLoreError, match=r"layer 1, mlp\.up_proj is no dense tensor of float numbers"):
        import_singular_values(tmp_path / "file.pt", saved())


def test_torch_file_that_is_no_dictionary_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "file.pt")
    with pytest.raises(WeLoreError, match=r"file\.pt holds a list, not a dictionary of tensors"):
        import_singular_values(tmp_path / "file.pt", saved())


def test_missing_file_is_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WeLoreError, match=r"none\.pt does not exist"):
        import_checkpoint(tmp_path / "none.pt", saved(), tmp_path / "out")
