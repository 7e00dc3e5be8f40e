"""A GPU that is not there: tensors that say cuda:0, hold real numbers, and refuse to mix with those of the CPU.

    import simulated_gpu

    simulated_gpu.install()        # before anything asks torch whether there is a GPU; there is no way back
    ...                            # any code
    print(simulated_gpu.ledger)    # host waits, traffic, float64, work left to the CPU, each by line of the package

A tensor of the GPU is a wrapper (as torch's own FakeTensor) around a tensor of the CPU that has the numbers. All ATen
calls pass through `_dispatch`, which checks what CUDA would check: the tensors of a call lie on one device (zero-
dimensional CPU tensors may join pointwise operations, CPU indices may index), a random generator belongs to that
device, and nobody reads the memory from the host. Results are those of the CPU: code that branches on losses, ranks or
errors takes the branches that it would take on a GPU. Speed and memory are not simulated.
"""

import collections
import contextlib
import dataclasses
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
PACKAGE = "/src/welore/"  # its lines appear in the ledger
MEMORY = 80 << 30

COPIES = {aten.copy_.default, aten._copy_from.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
WAITS = {  # their result, or its size, must be known to the host
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
HEAVY = PRODUCTS | {
    aten.linalg_qr.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default,
    aten._linalg_solve_ex.default,
    aten.geqrf.default,
}
HEAVY_SIZE = 16  # the smallest side of a matrix that counts as work; smaller ones are bookkeeping


@dataclasses.dataclass
class Ledger:
    """What the host and the GPU did, counted by the line of the package that asked for it.

    devices: calls by the device of their results.
    """

    waits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_to_host: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_to_device: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    float64: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    devices: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cpu_work: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def clear(self) -> None:
        """Begin anew."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).clear()

    def __str__(self) -> str:
        rows = []
        for field in dataclasses.fields(self):
            counter = getattr(self, field.name)
            rows.append(f"{field.name}: {counter.total():,}")
            rows += [f"    {number:>12,}  {line}" for line, number in counter.most_common(8)]
        return "\n".join(rows)


ledger = Ledger()
_threads = threading.local()
_current = 0  # the GPU that "cuda" means
_has_float64 = True


@functools.cache
def _inside_package(file: str) -> str:
    """A file's name in the package; empty if it is no file of it."""
    _before, inside, name = file.rpartition(PACKAGE)
    return name if inside else ""


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if name := _inside_package(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


# --- tensors --------------------------------------------------------------------------------------------------------


class GPUTensor(Tensor):
    """A tensor of the simulated GPU around one of the CPU, `numbers`."""

    numbers: Tensor
    _gpu: torch.device

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> "GPUTensor":
        assert type(numbers) is not GPUTensor
        with torch._C._DisableTorchDispatch():
            outside = torch.empty_strided(numbers.shape, numbers.stride(), dtype=numbers.dtype, device="meta")
            self = Tensor._make_subclass(cls, outside, False, dispatch_device=True, device_for_backend_keys=device)
        self.numbers = numbers
        self._gpu = device
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: self._gpu)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {self._gpu} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def tolist(self) -> Any:
        ledger.waits[_line()] += 1
        return self.numbers.tolist()

    def get_device(self) -> int:
        return self._gpu.index

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"{self._gpu}({self.numbers!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.numbers, self._gpu, self.requires_grad)


def _unpickled(numbers: Tensor, device: torch.device, requires_grad: bool) -> Tensor:
    return GPUTensor(numbers, device).requires_grad_(requires_grad)


# --- what every ATen call passes through ----------------------------------------------------------------------------


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = list(_leaves((args, kwargs)))
    ours = [x for x in leaves if isinstance(x, GPUTensor)]
    if func is torch.ops.prim.device.default:  # C++ would ask the driver for the streams of a GPU
        return torch.device("meta") if ours else args[0].device
    device = _requested(args, kwargs, ours)
    if str(func).startswith("aten.to."):  # in inference mode it arrives undivided
        return _to(args, kwargs, device)
    if not ours and (device is None or device.type != "cuda"):
        _count_cpu_work(func, leaves)
        return func(*args, **kwargs)
    _check_devices(func, args, leaves, ours)
    target = device or ours[0].device
    inner_args, inner_kwargs = _map(_inside, (args, kwargs))
    if device is not None and "device" in kwargs:
        inner_kwargs["device"] = CPU if device.type == "cuda" else device
    inner_kwargs.pop("pin_memory", None)
    line = _line()
    if func is aten._to_copy.default:
        _count_traffic(line, args[0], target, blocking=not kwargs.get("non_blocking"))
    ledger.launches[line] += 1
    ledger.devices[str(target)] += 1
    ledger.waits[line] += func in WAITS
    if func in PRODUCTS:
        inner_args = _autocast(inner_args)
    if func is aten.mm.dtype:  # which torch has on a GPU only
        func, inner_args = aten.mm.default, tuple(x.to(inner_args[2]) for x in inner_args[:2])
    result = func(*inner_args, **inner_kwargs)
    if target.type != "cuda" or (func in COPIES and not isinstance(args[0], GPUTensor)):
        return args[0] if func in COPIES else result
    same = {id(x.numbers): x for x in ours}  # of operations in place

    def outside(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, GPUTensor):
            return x
        if id(x) not in same:
            if x.dtype == torch.float64 and not _has_float64:
                raise TypeError("this simulated device has no float64")  # as MPS has none
            ledger.float64[line] += x.dtype == torch.float64
            same[id(x)] = GPUTensor(x, target)
        return same[id(x)]

    return _map(outside, result)


def _leaves(x: Any) -> Iterator[Any]:
    """What the lists and dicts of a call hold, as torch's own tree_leaves, which is slower."""
    if isinstance(x, tuple | list):
        for each in x:
            yield from _leaves(each)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)([_map(function, each) for each in x])
    if isinstance(x, dict):
        return {name: _map(function, each) for name, each in x.items()}
    return function(x)


def _inside(x: Any) -> Any:
    if isinstance(x, GPUTensor):
        return x.numbers
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _requested(args: Any, kwargs: dict[str, Any], ours: Sequence[GPUTensor]) -> torch.device | None:
    """The device that a call names; None if it names none."""
    named = kwargs.get("device")
    device = _full(named) if named is not None else next((_full(x) for x in args if isinstance(x, torch.device)), None)
    if device is not None and device.type == "meta" and torch._C._current_autograd_node() is not None:
        return ours[0].device if ours else _full("cuda")  # a backward pass in C++ wants a tensor like one of ours
    return device


def _full(device: Any) -> torch.device:
    """A device with its index, which a driver would know."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", _current) if device.type == "cuda" and device.index is None else device


def _exchange(index: int) -> int:
    """Makes another GPU the one that "cuda" means; the one it was."""
    global _current
    before, _current = _current, max(index, 0)
    return before


def _to(args: Any, kwargs: dict[str, Any], device: torch.device | None) -> Tensor:
    source: Tensor = args[0]
    dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), source.dtype)
    target = device or source.device
    if target == source.device and dtype == source.dtype:
        return source
    result: Tensor = _dispatch(aten._to_copy.default, (source,), {"dtype": dtype, "device": target})
    return result


def _check_devices(func: Any, args: Any, leaves: Sequence[Any], ours: Sequence[GPUTensor]) -> None:
    """RuntimeError where CUDA would refuse to mix devices."""
    for x in leaves:
        if isinstance(x, torch.Generator) and x.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{x.device.type}'")
    if func in COPIES:
        size = args[1].numel() * args[1].element_size()
        if {x.device for x in args[:2]} > {CPU}:
            where = ledger.bytes_to_host if args[0].device == CPU else ledger.bytes_to_device
            where[_line()] += size
        return
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, GPUTensor)]
    devices = {x.device for x in ours}
    if len(devices) < 2 and (not ours or not others):
        return
    if func in INDEXED and isinstance(args[0], GPUTensor) and len(devices) == 1:
        ledger.bytes_to_device[f"{_line()} (index)"] += sum(x.numel() * x.element_size() for x in others)
        return
    if len(devices) > 1 or func in PRODUCTS or any(x.ndim or x.numel() != 1 for x in others):
        shapes = [(str(x.device), tuple(x.shape)) for x in (*ours, *others)]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found several: {func} of {shapes}")


def _count_traffic(line: str, source: Tensor, target: torch.device, *, blocking: bool) -> None:
    size = source.numel() * source.element_size()
    if source.device == target:
        return
    if target.type == "cuda":
        ledger.bytes_to_device[line] += size
    else:
        ledger.bytes_to_host[line] += size
        ledger.waits[line] += blocking


def _count_cpu_work(func: Any, leaves: Sequence[Any]) -> None:
    if func in HEAVY:
        sides = [min(x.shape[-2:]) for x in leaves if isinstance(x, Tensor) and x.ndim > 1]
        if sides and min(sides) >= HEAVY_SIZE and (line := _line()) != "elsewhere":
            ledger.cpu_work[line] += 1


def _autocast(args: Any) -> Any:
    """Arguments of a product as autocast makes them, which in C++ sees a meta tensor and leaves it alone."""
    floats = {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
    casts = getattr(_threads, "casts", [None])
    if torch.float64 in floats:
        return args
    if casts[-1] is not None:
        dtype = casts[-1]
    elif len(floats) > 1:  # in the backward pass of one that was cast
        dtype = min(floats, key=lambda kind: kind.itemsize)
    else:
        return args
    return _map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, args)


class _Mode(TorchDispatchMode):
    """Sees the calls that make a tensor, which no tensor of ours takes part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _enter() -> None:
    if not getattr(_threads, "mode", None):
        _threads.mode = _Mode()
        _threads.mode.__enter__()
        torch._C._set_only_lift_cpu_tensors(True)


# --- what torch says of the machine ---------------------------------------------------------------------------------


def install(count: int = 1, *, float64: bool = True) -> None:
    """Give this process `count` simulated GPUs, for good; float64: whether they have it."""
    import transformers.trainer  # noqa: F401 - bitsandbytes looks for the real CUDA when it is imported

    global _has_float64
    _has_float64 = float64
    _install_driver(count)
    _install_conversions()
    _install_attention()
    _install_autocast()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one, as on a real GPU
    run = threading.Thread.run

    def run_with_gpu(self: threading.Thread) -> None:
        _enter()
        run(self)

    threading.Thread.run = run_with_gpu  # type: ignore[method-assign]  # a mode belongs to its thread
    _enter()


def _install_driver(count: int) -> None:
    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **options: value

    def synchronize(*args: Any) -> None:
        ledger.waits[f"{_line()} (synchronize)"] += 1

    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": count,
        "get_device_name": "simulated",
        "get_device_capability": (9, 0),
        "mem_get_info": (MEMORY, MEMORY),
        "get_rng_state": state,
        "get_rng_state_all": [state] * count,
        "_is_in_bad_fork": False,
    }
    sizes = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    seeds = ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")
    answers |= dict.fromkeys(sizes, 0)
    answers |= dict.fromkeys((*seeds, "reset_peak_memory_stats", "empty_cache", "_lazy_init"))
    for name, value in answers.items():
        setattr(torch.cuda, name, constant(value))
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        setattr(torch.cuda.random, name, constant(answers[name]))
    torch.cuda.synchronize = torch.accelerator.synchronize = synchronize
    torch.accelerator.is_available = constant(True)
    torch.accelerator.current_accelerator = constant(torch.device("cuda"))
    torch.accelerator.device_count = constant(count)
    torch.accelerator.current_stream = constant(types.SimpleNamespace(is_capturing=constant(False)))
    torch.accelerator.current_device_index = lambda: _current
    torch.cuda.Stream = lambda *args, **options: _Stream()
    torch.cuda.current_stream = lambda *args, **options: _Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_device = torch._C._cuda_getDevice = lambda: _current
    torch.cuda.set_device = lambda device: _exchange(_full(device).index)
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = _exchange


class _Stream:
    """All work is done when it is given."""

    def wait_stream(self, other: "_Stream") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """The host waits."""
        ledger.waits[f"{_line()} (synchronize)"] += 1


def _install_conversions() -> None:
    to = Tensor.to

    def to_device(self: Tensor, *args: Any, **options: Any) -> Tensor:
        def full(x: Any) -> Any:  # "cuda" without an index would ask the driver
            named = isinstance(x, torch.device | str) or (isinstance(x, int) and not isinstance(x, bool))
            return _full(x) if named and str(x).startswith(("cuda", *"0123456789")) else x

        return to(self, *map(full, args), **{name: full(value) for name, value in options.items()})

    def cuda(self: Tensor, device: Any = 0, *args: Any, **options: Any) -> Tensor:
        return to_device(self, _full(0 if device is None else device))

    Tensor.to = to_device  # type: ignore[method-assign,assignment]
    Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign,assignment]  # C++ would ask the driver

    def through_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
            if device is None or _full(device).type != "cuda":
                return make(*args, device=device, **options)
            return to_device(make(*args, device="cpu", **options), _full(device))

        return made

    torch.utils._device._device_constructors()  # the usual two belong to it, and it is made once
    torch.tensor = through_cpu(torch.tensor)
    torch.as_tensor = through_cpu(torch.as_tensor)


def _install_attention() -> None:
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Its equation, for the usual one asks in C++ for the device of its mask."""
        if not isinstance(query, GPUTensor):
            return usual(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return torch._safe_softmax(scores, -1).to(value.dtype) @ value  # type: ignore[attr-defined]  # as torch's

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]


def _install_autocast() -> None:
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(self: torch.autocast) -> Any:
        casts = _threads.__dict__.setdefault("casts", [None])
        ours = self.device == "cuda"
        casts.append((self.fast_dtype if self._enabled else None) if ours else casts[-1])
        return enter(self)

    def left(self: torch.autocast, *error: Any) -> Any:
        _threads.casts.pop()
        return leave(self, *error)

    torch.autocast.__enter__ = entered  # type: ignore[method-assign]
    torch.autocast.__exit__ = left  # type: ignore[method-assign]
