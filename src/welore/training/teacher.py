"""The model that another one learns from: loaded frozen, sharing what is equal, writing the text if asked to."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from welore.calibration.collect import TEACHER_SIZE
from welore.calibration.layerwise import Teacher
from welore.config import SELF, CalibrationConfig, FinetuneConfig
from welore.data.mixture import seed_of
from welore.data.packing import blocks_to_write
from welore.data.self_generated import generate_text
from welore.data.windows import TopK
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.io.parallel import ALONE, Processes
from welore.io.progress import Progress, counted, silent
from welore.models.copies import generation_copy
from welore.models.load import LoadedModel, fastest, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_teacher(config: FinetuneConfig, student: LoadedModel, context: RunContext) -> "PreTrainedModel":
    """The teacher, frozen, on the CPU in its own dtype; WeLoreError if it cannot teach this student."""
    assert config.distill is not None
    source = resolve_model(config.distill, cache_dir=context.cache_dir)
    if config.distill_weight == 1 and student.directory and source.resolve() == student.directory.resolve():
        raise WeLoreError(
            "the model is its own teacher and has nothing to learn from itself: name the dense model that it was made "
            "from, or give a distill_weight below 1"
        )
    teacher, teacher_tokenizer = load(
        source, "auto", "cpu", config.attention, trust_remote_code=context.trust_remote_code
    )
    refuse_other_vocabulary(student.model, student.tokenizer, teacher, teacher_tokenizer)
    teacher.requires_grad_(False)
    return teacher.eval()


@torch.no_grad()
def recorded_predictions(directory: Path, windows: Tensor, context: RunContext) -> TopK:
    """The predictions of a directory's model at every position of windows (count, length) of token ids.

    The model is in memory meanwhile, in the dtype in which the device computes fastest, and no longer.
    """
    settings = fastest(context.device)
    dtype = getattr(torch, settings["dtype"])
    trust = context.trust_remote_code
    model, _ = load(directory, dtype, context.device, settings["attention"], trust_remote_code=trust)
    model.eval()
    predictions = Teacher(TEACHER_SIZE)
    for window in counted(context.progress, list(windows), "predictions of the teacher"):
        ids = window.to(context.device)
        predictions.read(model(ids[None], use_cache=False).logits[0], ids.roll(-1))
    return TopK(**predictions.tensors(windows.shape[1]))


def refuse_other_vocabulary(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    teacher_tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Raise WeLoreError unless a number stands for the same token in both models."""
    heads: list[Any] = [model.get_output_embeddings() for model in (student, teacher)]
    sizes = [len(head.weight) for head in heads]
    if sizes[0] != sizes[1] or tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise WeLoreError(
            f"the teacher has another vocabulary ({len(teacher_tokenizer)} tokens, {sizes[1]} outputs; the model has "
            f"{len(tokenizer)} and {sizes[0]}): distilling needs the same tokens, as in the model it was made from"
        )


def share_frozen(student: "PreTrainedModel", teacher: "PreTrainedModel") -> None:
    """Let `teacher` use the student's own parameters where they are frozen and equal: one copy in memory."""
    own = dict(student.named_parameters(remove_duplicate=False))
    for name, parameter in list(teacher.named_parameters(remove_duplicate=False)):
        mine = own.get(name)
        if mine is None or mine.requires_grad or mine.dtype != parameter.dtype or not torch.equal(mine, parameter):
            continue
        module, _, last = name.rpartition(".")
        setattr(teacher.get_submodule(module), last, mine)


def write_text(
    teacher: Any,
    tokenizer: "PreTrainedTokenizerBase",
    config: FinetuneConfig,
    device: torch.device,
    processes: int = 1,
    progress: Progress = silent,
) -> Tensor:
    """Windows (count, max_length) that the teacher writes: self_tokens, or all that the steps read and a tenth more.

    The processes of a launcher write a share each.
    """
    from welore.training.arguments import length_of, sequences_read  # the Trainer, as in compression/recovery.py

    length = length_of(config)
    tokens = config.self_tokens or blocks_to_write(sequences_read(config, processes)) * length
    size = CalibrationConfig(num_tokens=tokens, max_length=length, seed=seed_of(config.seed, SELF))
    together = Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
    writer = generation_copy(teacher, device)
    return generate_text(writer, tokenizer, size, progress=progress, processes=together)
