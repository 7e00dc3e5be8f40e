"""The needs of every stage of a compression, from shapes alone: time, memory of host and card, room on the disk.

docs/how-to/large-models.md states the formulas. Operations are counted; their rates are measured elsewhere.
"""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from welore.allocation.plan import Allocation
from welore.calibration.layerwise import is_small, whole_bytes
from welore.compression.recovery import UPDATES, first_that_fits, number_of_steps
from welore.config import AUTO, MAX_LENGTH, NONE, SELF, DtypeName, FinetuneConfig, RecoveryConfig
from welore.data.self_generated import window_bytes, windows_at_once
from welore.errors import WeLoreError
from welore.io.memory import free_memory
from welore.layers.expert_names import is_of_expert
from welore.layers.experts import DOWN
from welore.layers.int8 import INT8
from welore.linalg.svd import working_bytes
from welore.models.copies import writing_dtype
from welore.models.experts import experts_of
from welore.models.int8 import with_int8
from welore.models.load import fastest
from welore.models.mlp import find_mlps
from welore.models.quantizer import WeLoreConfig
from welore.models.skeleton import decoder_blocks
from welore.models.targets import Target, in_blocks

if TYPE_CHECKING:
    from welore.compression.pipeline import Job

DISK_RATE = 5e8  # bytes per second
WRITING_SHARE = 0.45  # of the rate of large products, that of products with a row for every window
BANDWIDTH = 8e9  # bytes per second that a processor reads from its memory
LAUNCHES = 0.9e-3  # seconds of one decoder block and token on a GPU, where launches of kernels are the limit
# Operations over k^3, k^2 l, l^3 for a k x l matrix, float64, on one core: all singular values, then factors.
VALUES, SCALED_VALUES, VECTORS = (2.0, 1.2, 0.0), (3.2, 0.75, 0.4), (1.6, 1.4, 0.0)
REMOVAL = 2.0, 4.0  # the same of an MLP (d, f), over f^3 and d f^2
EIGENPROBLEM = 0.9, 4096, 2.6  # seconds of one of this size on a GPU, and how they grow with it
HEAD = 24 << 23  # bytes of the logits of a piece of a window, and of what they are computed from
ROWS = 24  # bytes of a logit while a model writes: in several dtypes, with its cumulated probability
Rates = Mapping[str, float]  # dtype -> operations per second


@dataclass(frozen=True)
class Machine:
    """Where a job computes. free: bytes of memory of the device, None if nothing tells. dtype: its fastest."""

    device: torch.device
    free: int | None
    dtype: DtypeName

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """The device as it is now."""
        return cls(device, free_memory(device), fastest(device)["dtype"])


@dataclass(frozen=True)
class Stage:
    """One stage. disk_bytes: of unfinished work.

    host_bytes, device_bytes: memory of the host, and of a device that is not the CPU. mapped_bytes: of the weights'
    files, which the host reads where they lie: resident while nothing else wants the room. note: how it is done, or
    that it does not fit.
    """

    name: str
    seconds: float
    host_bytes: float
    device_bytes: float
    disk_bytes: float
    mapped_bytes: float = 0.0
    note: str = ""


class Needs:
    """The formulas, with everything that they rest on. Of memory and disk they are upper bounds.

    parameters, targeted: numbers of the dense model. stored: of the targeted matrices afterwards. routed: share of the
    tokens that reach an expert, 1 without any. active: parameters that a token meets. moments, expert_moments: numbers
    of the second moments of the largest decoder block, without those of its experts, and of all of these.
    """

    def __init__(self, job: "Job", machine: Machine | None = None) -> None:
        self.job, self.source, self.machine = job, job.source, machine or Machine.of(job.context.device)
        self.on_cpu = self.machine.device.type == "cpu"
        self.config: Any = self.source.skeleton.config
        self.text: Any = self.config.get_text_config(decoder=True)
        self.parameters = sum(p.numel() for p in self.source.skeleton.parameters())
        self.targeted = sum(math.prod(target.shape) for target in self.source.targets)
        self.layers = len(decoder_blocks(self.source.skeleton)[1])
        self.experts = max(experts_of(self.source.skeleton).values(), default=0)  # of a layer
        self.routed = getattr(self.text, "num_experts_per_tok", self.experts) / self.experts if self.experts else 1.0
        self.targeted_experts = sum(math.prod(t.shape) for t in self.source.targets if is_of_expert(t.name))
        self.active = self.parameters - (1 - self.routed) * self.targeted_experts
        self.blocks = in_blocks(job.fewer.targets, job.grids)
        self.dtype = self.source.dtype(self.source.targets[0])
        self.dense_bytes = sum(self.source.info(name).bytes for name in self.source.names())
        self.share = 1.0 if job.config.keep is None else job.config.keep
        self.stored = self.share * self.targeted
        self.tokens, self.length = job.calibration.tokens, job.calibration.max_length or MAX_LENGTH
        self.mlps = find_mlps(job.fewer.skeleton, job.fewer.targets) if job.config.mlp_pruning else []
        self.scaled = job.scaling != NONE
        chosen = job.calibration.dtype
        self.swept: torch.dtype = getattr(torch, self.machine.dtype if chosen == AUTO else chosen)
        self.moments, self.expert_moments = self._moments()

    def result_bytes(self, removed: float) -> float:
        """Bytes of the result without this many numbers; of scales there are at most two for every row of a layer."""
        size = self.dense_bytes - removed * self.dtype.itemsize
        if self.job.config.weights == INT8:
            tensors = [self.source.copied(name) for name in self.source.names()]
            layers = with_int8(WeLoreConfig({}), self.source.skeleton, tensors).int8
            shapes = [self.source.info(f"{layer}.weight").shape for layer in layers]
            scales = 2 * sum(max(shape) for shape in shapes)
            size -= (self.dtype.itemsize - 1) * (sum(map(math.prod, shapes)) - removed) - scales * self.dtype.itemsize
        return size

    def _moments(self) -> tuple[int, int]:
        groups: dict[str, list[Target]] = {}
        blocks: dict[str, list[int]] = {}
        inside = re.escape(decoder_blocks(self.source.skeleton)[0] + ".")
        for target in self.source.targets:
            groups.setdefault(target.name.rpartition(".")[0], []).append(target)
        for name, group in groups.items():  # the last of a module reads an input of its own, the others share one
            moments = sum(n**2 for n in {t.shape[1] for t in group[:-1]}) + group[-1].shape[1] ** 2
            block = blocks.setdefault(re.sub(rf"({inside}\d+\.).*", r"\1", name), [0, 0])
            block[is_of_expert(group[0].name)] += moments + sum(target.shape[0] ** 2 for target in group)
        return max(block[0] for block in blocks.values()), max(block[1] for block in blocks.values())

    def stages(self, rates: Rates | None = None) -> list[Stage]:
        """All stages that the settings ask for; seconds are 0 without rates."""
        rates = rates or dict.fromkeys(("float64", "float32", "bfloat16", "float16"), math.inf)
        job, stages = self.job, []
        if job.collects:
            stages += [self._text(rates)] * (job.calibration.dataset == SELF) + [self._statistics(rates)]
        if job.experts is not None:
            stages.append(self._experts(rates))
        if not job.plain:
            again = {layer.name for mlp in self.mlps for layer in mlp.layers}  # neurons change these
            operations = SCALED_VALUES if self.scaled else VALUES
            seconds = sum((1 + (t.layer in again)) * self._seconds(t, operations, rates) for t in self.blocks)
            stages.append(self._stage("decompositions", seconds, self._in_work(self._one), self._lasting))
        if self.mlps:
            stages.append(self._pruning(rates))
        if not job.plain:
            seconds = sum(self._seconds(t, VECTORS, rates) for t in self.blocks)
            disk = max(self._lasting, 4 * self.stored)
            stages.append(self._stage("factors", seconds, self._in_work(self._one), disk))
        if job.recovery is not None:
            stages.append(self._recovery(job.recovery, rates))
        size = self.result_bytes(self.targeted - self.stored)
        largest = max(math.prod(target.shape) for target in self.blocks)
        return [*stages, Stage("writing", size / DISK_RATE, 3 * 4 * largest, 0, size + stages[-1].disk_bytes)]

    def _stage(
        self, name: str, seconds: float, working: float, disk: float, *, host: float = 0, note: str = ""
    ) -> Stage:
        """working: bytes on the device that computes; host: beside it. The dense weights are read in every stage."""
        host += working * self.on_cpu
        return Stage(name, seconds, host, working * (not self.on_cpu), disk, self.dense_bytes, note)

    def _text(self, rates: Rates) -> Stage:
        """The weights, copied where another dtype is faster, and as many windows as there is memory for."""
        dtype, count = writing_dtype(self.dtype, self.machine.device), math.ceil(self.tokens / self.length)
        copied = dtype.itemsize * self.parameters * (not self.on_cpu or dtype != self.dtype)
        free = None if self.machine.free is None else max(0, self.machine.free - int(copied))
        at_once = windows_at_once(self.config, dtype, free, self.length, count)
        window = window_bytes(self.config, self.length, dtype.itemsize) + ROWS * self.text.vocab_size
        steps = math.ceil(count / at_once) * self.length
        seconds = 2 * self.active * self.tokens / (WRITING_SHARE * rates[_name(dtype)])
        read = steps * dtype.itemsize * self.parameters / BANDWIDTH  # every step reads all weights
        seconds = max(seconds, read if self.on_cpu else steps * self.layers * LAUNCHES)
        fits = self.on_cpu or self.machine.free is None or copied < self.machine.free
        note = f"{at_once} windows at once" if fits else "does not fit: take another device, --writer vllm or a text"
        return self._stage("text", seconds, copied + at_once * window, 4 * self.tokens, note=note)

    def _statistics(self, rates: Rates) -> Stage:
        """One block, its sums and a batch of activations; or all of them, of a small model."""
        calibration, targets = self.job.calibration, self.source.targets
        text = (math.ceil(self.tokens / self.length), self.length)
        entire = calibration.whole_model
        if entire is None:
            entire = is_small(self.source.skeleton, targets, text, calibration.batch_size, self.machine.free)
        batch = min(calibration.batch_size, text[0]) * self.length
        boundary = self.swept.itemsize * self.tokens * self.text.hidden_size
        met = self.targeted - (1 - self.routed) * self.targeted_experts
        sweep = (4 * met if entire else 6 * met + 4 * self.routed * self.targeted_experts) * self.tokens
        grams = 1.3 * self.tokens * (self.moments + self.routed * self.expert_moments) * self.layers / rates["float32"]
        # Experts are in work a few at a time, and have an average.
        sums = 4 * (self.moments + self.expert_moments * min(1, (self.job.context.workers + 1) / max(1, self.experts)))
        if entire:
            memory, disk = whole_bytes(self.source.skeleton, targets, batch) + self._in_work(self._one), self._lasting
        else:
            outside = 0 if self.on_cpu else self.dtype.itemsize * (self.parameters - self.targeted)
            sides = sum(sum(t.shape) * (self.routed if is_of_expert(t.name) else 1) for t in targets)
            activations = 6 * batch * sides / self.layers
            block = 6 * (self.targeted - self.targeted_experts) / self.layers
            if not self.on_cpu:  # there the experts stay in their file, but for the matrix that multiplies
                block += self.dtype.itemsize * self.targeted_experts / self.layers
            elif self.experts:
                block += self.swept.itemsize * max(math.prod(t.shape) for t in targets)
            largest = 8 * max(max(target.shape) for target in targets) ** 2
            memory = outside + block + sums + largest + max(activations, self._in_work(self._one)) + HEAD
            disk = max(boundary * (self.layers + 1), self._lasting) + 2 * boundary  # one dwindles as the other grows
            if self.experts:  # what enters and leaves them, and the sums of a layer
                disk += 8 * self.tokens * self.text.hidden_size + 4 * self.expert_moments
        packed = 0 if self.on_cpu else sums
        note = "the whole model at once" if entire else "block by block"
        seconds = sweep / rates[_name(self.swept)] + grams
        return self._stage("statistics", seconds, memory, disk, host=packed, note=note)

    def _in_work(self, one: float) -> float:
        """Bytes of as many matrices as are in work at once, each of `one`: those that fit into the free memory."""
        most = self.job.context.workers * one
        return max(one, most if self.machine.free is None else min(most, self.machine.free))

    @property
    def _one(self) -> int:
        """Bytes of the largest decomposition in work."""
        return max(working_bytes(t.shape, scaled=self.scaled) for t in self.blocks)

    @property
    def _lasting(self) -> float:
        """Bytes on the disk until the plan is known: decompositions, 4 k^2; of MLPs that may lose neurons second
        moments: half of the inputs' in float32, half of the outputs' in float16.
        """
        if self.job.plain:  # the refitted matrices alone
            return sum(4.0 * math.prod(mlp.down_layer.shape) for mlp in self.mlps)
        later = {layer.name: 0.0 for mlp in self.mlps for layer in mlp.layers}
        total = 0.0
        for target in self.blocks:
            size = 4.0 * min(target.shape) ** 2
            total += size * (target.layer not in later)
            later[target.layer] = later.get(target.layer, 0.0) + size
        for mlp in self.mlps:
            moments = sum(t.shape[0] ** 2 for t in mlp.layers) + 2 * mlp.width**2 + 2 * mlp.up_layers[0].shape[1] ** 2
            total += max(moments, sum(later[layer.name] for layer in mlp.layers))
        return total

    def _experts(self, rates: Rates) -> Stage:
        """The loss of each expert, from two products."""
        shapes = [t.shape for t in self.source.targets if is_of_expert(t.name) and t.name.endswith(f".{DOWN}")]
        seconds = sum(2 * d * f * (d + f) for d, f in shapes) / rates["float32"]
        return self._stage("expert pruning", seconds, self._in_work(max(4 * (d + f) ** 2 for d, f in shapes)), 0)

    def _seconds(self, target: Target, operations: tuple[float, float, float], rates: Rates) -> float:
        k, long = min(target.shape), max(target.shape)
        if self.on_cpu:
            return sum(a * b for a, b in zip(operations, (k**3, k * k * long, long**3), strict=True)) / rates["float64"]
        unit, size, power = EIGENPROBLEM
        return unit * (k / size) ** power * (operations is not VECTORS) * math.isfinite(rates["float32"])

    def _pruning(self, rates: Rates) -> Stage:
        """The order in which neurons go: H^-1, W and G W in float32, and H in float64 for a moment."""
        a, b = REMOVAL
        shapes = [mlp.down_layer.shape for mlp in self.mlps]
        seconds = sum(a * f**3 + b * d * f * f for d, f in shapes) / rates["float64" if self.on_cpu else "float32"]
        one = max(24 * f * f + 16 * d * f + 8 * d * d for d, f in shapes)
        return self._stage("mlp pruning", seconds, self._in_work(one), self._lasting)

    def _recovery(self, config: RecoveryConfig, rates: Rates) -> Stage:
        """The first choice of what is trained that fits; all matrices have the same share of their ranks."""
        windows = (self.tokens if config.dataset == SELF else config.num_tokens or 0) // self.length
        steps = number_of_steps(config, windows, config.batch_size, self.share, plain=self.job.plain)
        training = FinetuneConfig(
            batch_size=config.batch_size,
            max_length=self.length,
            dtype=self.machine.dtype,
            attention="eager" if self.on_cpu else None,
        )
        blocks = in_blocks(self.job.fewer.targets, self.job.grids)
        ranks = {t.name: max(1, int(self.share * math.prod(t.shape) / sum(t.shape))) for t in blocks}
        even = [Allocation(t.name, t.shape, ranks[t.name], not self.job.plain, 0.0) for t in blocks]
        name, chosen, working = first_that_fits(
            self.source, even, config, training, self.machine.device, self.machine.free
        )
        outside, checkpoint = self.parameters - self.targeted, 24 * self.stored * (name != UPDATES.name)
        operations = 8 * steps * config.batch_size * self.length * (self.stored + outside)
        disk = 4 * self.stored + self.dtype.itemsize * (self.stored + outside) + checkpoint
        note = f"of {name}" + ", with activations computed again" * chosen.gradient_checkpointing
        host = self.dtype.itemsize * (self.stored + outside) * (chosen.stream_weights and not self.on_cpu)
        note += ", frozen weights on the host" * chosen.stream_weights
        if self.machine.free is not None and working > self.machine.free:
            note = "does not fit: left out"
        return self._stage("recovery", operations / rates[self.machine.dtype], working, disk, host=host, note=note)


def require_room(job: "Job", directory: Path) -> None:
    """Raise WeLoreError if the disk has too little room for the unfinished work of a job, in `directory`.

    Stages that find too little memory do less at once, or say so themselves.
    """
    largest = max(Needs(job).stages(), key=lambda stage: stage.disk_bytes)
    there = next(at for at in (directory, *directory.parents) if at.exists())
    done = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    free = shutil.disk_usage(there).free
    if largest.disk_bytes > free + done:
        raise WeLoreError(
            f"{largest.name} needs {size_text(largest.disk_bytes)} of room at {directory}, and {size_text(free)} are "
            "free: write to another disk, or take fewer num_tokens, or mlp_pruning 0"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_text(size: float) -> str:
    """Bytes in a sentence."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
