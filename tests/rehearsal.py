"""A rehearsal of the CUDA path without a GPU: tensors that say they are on `cuda:0`, while their data stay on the CPU.

`with rehearsal() as ledger:` makes `torch.device("cuda")` usable in this process. Every operation that mixes such a
tensor with one of the host raises, as on a GPU, and `ledger.waits` names each place at which a host would have to wait
for the GPU: reading a value, a copy from or to memory that is not page-locked, an index that depends on values, an
event that is waited for before anything else was. The arithmetic is the CPU's, so results equal the CPU's bit for bit.

What it does not show: CUDA's kernels and their rounding; TF32, and CUDA's own rules of autocast (the CPU's hold here);
inference mode (such tensors cannot be in it, so gradients are off instead); memory and its limits; speed, and what
happens at the same time; NCCL; torch.compile; waits inside of CUDA's kernels and allocator. A card shows those.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data._utils.pin_memory import pin_memory as pin_batch

from data.loaders import Loader

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
MEMORY = 1 << 40  # bytes of the GPU that is not there
aten = torch.ops.aten
READS_VALUES = {  # the size or the value of the result is only known on the device
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.equal.default, aten.is_nonzero.default,
}  # fmt: skip


class Wait(NamedTuple):
    """The host waits for the device."""

    what: str
    place: str  # file:line of this repository


class Ledger:
    """What the host has had to wait for; `ticks` counts operations of the device."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.ticks = self.arrived = 0  # operations so far, and those that the host knows to be done
        self.page_locked: dict[int, Tensor] = {}  # by the address of their memory; kept, so that none is used again

    def wait(self, what: str) -> None:
        self.arrived = self.ticks
        self.waits.append(Wait(what, _place()))

    def is_pinned(self, x: Tensor) -> bool:
        return not isinstance(x, OnCuda) and x.untyped_storage().data_ptr() in self.page_locked

    def pinned(self, x: Tensor) -> Tensor:
        self.page_locked[x.untyped_storage().data_ptr()] = x
        return x

    def copied(self, host: Tensor, non_blocking: bool, what: str) -> None:
        if not (non_blocking and self.is_pinned(host)):
            self.wait(what)


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of this repository"


LEDGERS: list[Ledger] = []  # the one that is open


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA; `host` has its data."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> "OnCuda":
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), **layout, device=host.device, requires_grad=requires_grad
        )

    def __init__(self, host: Tensor, requires_grad: bool = False):
        self.host = host

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # a save holds plain tensors
        LEDGERS[-1].wait("a save")
        return self.host.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ledger = LEDGERS[-1]
        ledger.ticks += 1
        if func is aten.copy_.default:
            return _copy(ledger, *args, **(kwargs or {}))
        flat, spec = tree_flatten((args, kwargs or {}))
        there = {id(x.host): x for x in flat if isinstance(x, OnCuda)}
        for x in flat:  # a host tensor with one number may enter, as in torch
            if isinstance(x, Tensor) and not isinstance(x, OnCuda) and x.dim():
                raise RuntimeError(f"{func}: a host tensor {tuple(x.shape)} meets tensors on cuda:0, at {_place()}")
        masks = args[1] if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) else ()
        if func in READS_VALUES or any(x is not None and x.dtype == torch.bool for x in masks):
            ledger.wait(str(func))
        args, kwargs = tree_unflatten([x.host if isinstance(x, OnCuda) else x for x in flat], spec)
        result = func(*args, **{key: _on_host(value) for key, value in kwargs.items()})

        def wrapped(x: Any) -> Any:  # an operation in place returns what it was given
            if not isinstance(x, Tensor):
                return x
            return there[id(x)] if id(x) in there else OnCuda(x)

        return tree_map(wrapped, result)


def _copy(ledger: Ledger, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(to, OnCuda) and not isinstance(source, OnCuda):
        ledger.copied(source, non_blocking, "a copy to the device")
    elif isinstance(source, OnCuda) and not isinstance(to, OnCuda):
        ledger.copied(to, non_blocking, "a copy to the host")
    there, here = (x.host if isinstance(x, OnCuda) else x for x in (to, source))
    there.copy_(here)
    return to


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if _is_cuda(value) else value


class Calls(TorchFunctionMode):
    """Calls of torch that name a device, or move a tensor between two."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if func is torch.Tensor.to:
            return self.to(x, *args[1:], **kwargs)
        if func is torch.Tensor.backward:
            with self:  # blocks that are computed again on the way back
                return torch.autograd.backward(x, kwargs.get("gradient"))
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self.to(x, torch.device(name), **kwargs)
        if func is torch.Tensor.pin_memory:
            return self.ledger.pinned(x.clone())
        if func is torch.Tensor.is_pinned:
            return self.ledger.is_pinned(x)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(x, OnCuda):
            if func is not torch.Tensor.tolist:
                raise TypeError(f"can't convert a cuda:0 tensor to numpy, at {_place()}")
            self.ledger.wait(name)
            return x.host.tolist()
        pin = kwargs.pop("pin_memory", False)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
            if name in ("tensor", "as_tensor", "from_numpy"):
                self.ledger.wait(f"torch.{name} on the device")
            wants_grad = kwargs.pop("requires_grad", False)
            return OnCuda(func(*args, **kwargs), wants_grad)
        result = func(*args, **kwargs)
        return self.ledger.pinned(result) if pin else result

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or x.device, dtype or x.dtype
        if device.type == x.device.type:
            return torch.Tensor.to(x, dtype, copy=copy)
        assert not (torch.is_grad_enabled() and x.requires_grad), "no gradient goes from one device to the other here"
        if isinstance(x, OnCuda):
            self.ledger.wait("a copy to the host")
            return x.host.to(dtype, copy=True)
        self.ledger.copied(x, non_blocking and dtype == x.dtype, "a copy to the device")
        return OnCuda(x.detach().to(dtype, copy=True))


class Event:
    """In place of torch.cuda.Event."""

    def record(self, *_: Any) -> None:
        self.at = LEDGERS[-1].ticks

    def synchronize(self) -> None:
        if self.at > LEDGERS[-1].arrived:
            LEDGERS[-1].wait("an event")


def _torch_cuda(ledger: Ledger) -> dict[str, Any]:
    """What the program asks of `torch.cuda`."""
    properties = SimpleNamespace(total_memory=MEMORY, name="pretended GPU", major=9, minor=0)
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda device: None, "empty_cache": lambda: None,
        "synchronize": lambda device=None: ledger.wait("torch.cuda.synchronize"),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: ledger.ticks, "memory_reserved": lambda device=None: ledger.ticks,
        "max_memory_allocated": lambda device=None: ledger.ticks, "reset_peak_memory_stats": lambda device=None: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False, "Event": Event,
    }  # fmt: skip


def _of_the_cpu(of_device: Callable) -> Callable:
    return lambda *args, **kwargs: of_device(*["cpu"][: len(args)], *args[1:], **kwargs)


def _no_grad(mode: Any) -> None:
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


def _grad_again(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


@contextmanager
def rehearsal() -> Iterator[Ledger]:
    """Pretend that there is a CUDA device."""
    ledger, iterate, generator = Ledger(), Loader.__iter__, torch.Generator

    def pinned_batches(loader: Loader) -> Iterator:
        pin = loader.pin_memory
        return (pin_batch(batch) if pin else batch for batch in iterate(loader))

    with ExitStack() as stack:
        for name, value in _torch_cuda(ledger).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Loader, "__iter__", pinned_batches))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device="cpu": generator("cpu")))
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, _of_the_cpu(getattr(torch, name))))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new, old torch
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name, lambda self: None))
        stack.enter_context(mock.patch.multiple(torch.inference_mode, __enter__=_no_grad, __exit__=_grad_again))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.to` replaces parameters
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        LEDGERS.append(ledger)
        stack.callback(LEDGERS.pop)
        stack.enter_context(Calls(ledger))
        yield ledger
