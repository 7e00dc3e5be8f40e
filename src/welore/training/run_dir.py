"""The directory of a fine-tuning run.

OUT/run.json              settings and digests; a resumed run must have the same
OUT/written.safetensors   the teacher's text, if the run trains on it
OUT/checkpoints/          of the Trainer; `resume` goes on from the last complete one
OUT/model/                the result, loads with from_pretrained
OUT/finetune.json         the record; written last, so that it marks a finished run

A run that replaces another one is in OUT.work until it is finished: the other one stays until then.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from welore.errors import WeLoreError, first_line
from welore.io.atomic import (
    atomic_directory,
    read_json,
    remove,
    replace_directory,
    require_free,
    resolved,
    settle_directory,
    storage_errors,
    tidy,
    work_directory,
    write_json,
)
from welore.io.claim import claimed
from welore.io.fields import typed
from welore.io.parallel import launched_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUN, TUNED, CHECKPOINTS, MODEL = "run.json", "finetune.json", "checkpoints", "model"
WRITTEN = "written.safetensors"
CHECKSUMS = "checksums.json"
FOLLOW = ("max_steps", "warmup_steps")  # they may follow from the data: another difference is named first
STEP = ("batch_size", "gradient_accumulation_steps", "processes")  # whose product is what a step reads
STATE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint


@contextmanager
def run_directory(out: str | Path, *reads: Any, resume: bool, overwrite: bool, record: str = TUNED) -> Iterator[Path]:
    """The directory in which a run begins or goes on, claimed for it: OUT, or OUT.work if it replaces another run.

    OUT.work takes the name OUT when the block ends well; a run there that was killed is resumed there. All processes
    of a run call this, the first of them writes. reads: what the run reads. record: the file that marks a finished run.
    Raises WeLoreError unless a run may begin, or go on.
    """
    out = resolved(out)
    work, leads = work_directory(out), launched_rank() == 0
    directory = work if overwrite or (resume and (work / RUN).is_file()) else out
    if resume and overwrite:
        raise WeLoreError("give resume or overwrite, not both: one goes on with the run, the other deletes it")
    if resume and not (directory / RUN).is_file():
        raise WeLoreError(f"{out} holds no run that could be resumed: leave resume out to begin one")
    if not (resume or overwrite) and (out / RUN).is_file() and not (out / record).is_file():
        raise WeLoreError(f"{out} holds an unfinished run: give resume to go on with it, overwrite to begin another")
    with claimed(out, *(() if resume else reads), overwrite=overwrite or resume, marker=RUN, leads=leads):
        if leads:
            tidy(work)
            if (work / RUN).is_file() and (work / record).is_file():  # killed before it took its name
                replace_directory(work, out)
                directory = out
            if resume and (directory / record).is_file():
                raise WeLoreError(f"the run in {out} is finished (see {record}): there is nothing to resume")
            if directory == work and not resume:
                require_free(work, overwrite=True, marker=RUN)  # it may be a user's
        try:
            with storage_errors(out):
                yield directory
        except BaseException as error:
            if (directory / RUN).is_file():
                error.add_note(f"the run lies in {directory}: --resume goes on there")
            raise
        if leads:
            for leftover in directory.glob(".*.welore-*"):  # of a part that was finished by an earlier process
                remove(leftover)
            if directory == work:
                replace_directory(work, out)


def begin(out: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make the directory of a new run and say in it what it is; or check a resumed one, which may differ in STEP."""
    if not resume:
        with atomic_directory(out, overwrite=True, marker=RUN) as unfinished:
            write_json(unfinished / RUN, identity)
        return
    before = _flat(typed(read_json(out / RUN), dict, str(out / RUN)))
    now = _flat(json.loads(json.dumps(identity)))
    before.setdefault("model_settings_sha256", now.get("model_settings_sha256"))  # runs of version 0.1 have none
    processes = now.get(STEP[-1])
    read, reads = (math.prod(typed(run.pop(n, 1), int, f"{n} in {out / RUN}") for n in STEP) for run in (before, now))
    if read != reads:
        raise WeLoreError(
            f"{out} holds a run that reads {read} sequences in a step, now it would read {reads}: choose batch_size "
            f"and gradient_accumulation_steps whose product with the number of processes ({processes}) is {read}"
        )
    for name in sorted(dict.fromkeys([*now, *before]), key=FOLLOW.__contains__):
        if before.get(name) != now.get(name):
            raise WeLoreError(
                f"{out} holds another run: its {name} is {before.get(name)!r}, now it is {now.get(name)!r}; resume it "
                "with its own settings, or choose another directory"
            )


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is complete; what a killed run left incomplete, or is damaged, is passed over."""
    checkpoints = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    sealed = [path for path in checkpoints if (path / CHECKSUMS).is_file()]
    for path in sorted(sealed or checkpoints, key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
            if not sealed or read_json(path / CHECKSUMS) == _checksums(path):
                return path
        except (OSError, ValueError):
            continue
    return None


@contextmanager
def read_checkpoint(checkpoint: Path | None, *, sharded: bool = False) -> Iterator[None]:
    """Name the checkpoint from which a run goes on if it is damaged; sharded: whether the run is under FSDP now."""
    if checkpoint is not None and any(checkpoint.glob("pytorch_model_fsdp*")) != sharded:
        with_or_not = "without" if sharded else "with"
        raise WeLoreError(f"{checkpoint} was written {with_or_not} FSDP: resume the run {with_or_not} FSDP, too")
    try:
        yield
    except Exception as error:  # torch and safetensors have many errors for that
        damaged = {"SafetensorError", "UnpicklingError", "EOFError"} & {type(error).__name__}
        if checkpoint is None or not (damaged or "PytorchStreamReader" in str(error)):
            raise
        raise WeLoreError(f"{checkpoint} is damaged ({first_line(error)}): delete it to go on without it") from error


def seal(checkpoint: Path) -> None:
    """Put a checkpoint on the disk, with its checksums, by which damage is seen before the run goes on there."""
    settle_directory(checkpoint)
    write_json(checkpoint / CHECKSUMS, _checksums(checkpoint))


def _checksums(directory: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS):
        with path.open("rb") as file:
            digests[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "blake2b").hexdigest()
    return digests


def gathered(model: "PreTrainedModel") -> dict[str, Tensor] | None:
    """The tensors of a model that is cut over the processes, whole: in the first process, empty in the others.

    All of them must call this. None for a model that is not cut.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # of tied tensors the first name
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow, seldom needed

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in tensors.items() if name in once}


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 over name, shape and the first 1024 numbers of every parameter, as float32."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """SHA-256 of a model's configuration: with the same weights another one is another model."""
    content = {n: v for n, v in config.to_diff_dict().items() if n not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in content.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
