"""Offers tensors that carry a pretend CUDA device: CPU numbers, but the rules of a GPU.

Mixing devices raises as on a GPU, and every copy between host and device is noted with the line
of this repository that asked for it. Source of the rules: PyTorch's CUDA semantics notes, and
what `torch.cuda.set_sync_debug_mode` reports.

A `PretendTensor` wraps a plain tensor. PyTorch's C++ takes it for a CPU tensor (autograd needs no
driver then); Python sees a CUDA device, and two modes translate what Python asks for by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.pretend_gpu import Driver
from support.pretend_world import World, entered, note_to_device, note_to_host, world
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ATEN = torch.ops.aten
CPU = torch.device("cpu")
# Operations that may take tensors of several devices: copies, and lookups by host indices.
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
# Operations whose result the host must know, so that it waits for the device.
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave", "aten::nonzero_numpy", "aten::histc",
}  # fmt: skip
GROUPED_CAPABILITIES = (9, 10)  # elsewhere the group sizes are read by the host


class PretendTensor(Tensor):
    """A tensor on a pretend GPU; its numbers are those of `raw`, a plain tensor."""

    @staticmethod
    def __new__(cls, raw: Tensor, place: torch.device):
        # Never an inference tensor: views of weights must not be ones.
        with torch._C._InferenceMode(False):
            return Tensor._make_wrapper_subclass(
                cls,
                raw.size(),
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                layout=raw.layout,
                device=CPU,
                requires_grad=False,
            )

    def __init__(self, raw: Tensor, place: torch.device):
        self.raw, self.place = raw, place

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __repr__(self, **_) -> str:
        return f"PretendTensor({self.raw}, device={self.place})"

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), _like(self, self.detach().clone()))

    # So that `nn.Module.to` swaps a parameter for one of these in place, keeping ties.
    def __tensor_flatten__(self):
        return ["raw"], self.place

    @staticmethod
    def __tensor_unflatten__(inner, place, _size, _stride):
        return PretendTensor(inner["raw"], place)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    return torch.nn.Parameter(copy, tensor.requires_grad) if tensor.is_leaf else copy


def _raw(tensor: PretendTensor) -> Tensor:
    return tensor.raw


def place_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, PretendTensor) else tensor.device


def tensors_in(args, kwargs) -> list[Tensor]:
    """All tensors of a call: arguments, and items of lists among them."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value, {})
    return found


def swapped(value, kind: type, swap: Callable):
    """A value of a call with the tensors of a kind swapped for others, in lists too."""
    if isinstance(value, kind):
        return swap(value)
    if isinstance(value, list | tuple):
        return type(value)(swapped(item, kind, swap) for item in value)
    return value


# What Python asks for by name.


def call(func, args: tuple, kwargs: dict):
    """A function of PyTorch as Python called it, when tensors or a device here are CUDA's."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _plain_call(func, args, kwargs)
    if name in MOVES and isinstance(args[0], Tensor):
        return MOVES[name](func, *args, **kwargs)
    pretend = [t for t in tensors_in(args, kwargs) if isinstance(t, PretendTensor)]
    own_place = pretend[0].place if pretend else None
    if kwargs.get("device") is not None:
        return _made_on(func, world().device(kwargs["device"]), args, kwargs)
    with world().at(own_place or world().place):
        return _plain_call(func, args, kwargs)


def _plain_call(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _made_on(func, place: torch.device, args, kwargs):
    """A new tensor on a device that the call names: `torch.zeros(2, device="cuda")`."""
    if place.type == "meta":
        return _plain_call(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if place.type == "cuda" and name in ("tensor", "as_tensor", "asarray", "new_tensor"):
        if not (args and isinstance(args[-1], PretendTensor)):
            note_to_device(f"torch.{name}", None, non_blocking=False)
    with world().at(None):
        made = _plain_call(func, args, kwargs | {"device": CPU})
    raw = made.raw if isinstance(made, PretendTensor) else made
    if place.type == "cpu":
        return raw
    placed = PretendTensor(raw.detach(), place)
    return placed.requires_grad_() if kwargs.get("requires_grad") else placed


def _to(func, tensor: Tensor, *args, **kwargs):
    """`tensor.to(...)` in all its forms."""
    device, dtype, flags = kwargs.get("device"), kwargs.get("dtype"), []
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = place_of(value), value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            device = value
    non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
    is_copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
    target = place_of(tensor) if device is None else world().device(device)
    if target.type == "meta":
        return torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="meta")
    if target == place_of(tensor):
        with world().at(target if target.type == "cuda" else None):
            return _plain_call(func, (tensor,), {"dtype": dtype or tensor.dtype, "copy": is_copy})
    return move(tensor, target, dtype=dtype, non_blocking=non_blocking)


def move(tensor: Tensor, target: torch.device, *, dtype=None, non_blocking: bool = False) -> Tensor:
    """A copy on another device."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("pretend tensors carry no gradient from device to device")
    raw = tensor.raw if isinstance(tensor, PretendTensor) else tensor.detach()
    copied = raw.to(dtype or raw.dtype, copy=True)
    if target.type == "cpu":
        note_to_host("to", waits=not non_blocking)
        return copied
    if not isinstance(tensor, PretendTensor):
        note_to_device("to", tensor, non_blocking=non_blocking)
    return PretendTensor(copied, target)


def _cpu(func, tensor: Tensor, *_, **__):
    return _to(Tensor.to, tensor, CPU)


def _cuda(func, tensor: Tensor, device=None, non_blocking: bool = False, **_):
    return _to(Tensor.to, tensor, "cuda" if device is None else device, non_blocking=non_blocking)


def _tolist(func, tensor: Tensor):
    if isinstance(tensor, PretendTensor):
        note_to_host("tolist")
        tensor = tensor.raw
    return _plain_call(func, (tensor,), {})


def _numpy(func, tensor: Tensor, *args, **kwargs):
    if isinstance(tensor, PretendTensor):
        raise TypeError(
            f"can't convert {tensor.place} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )
    return _plain_call(func, (tensor, *args), kwargs)


def _pin_memory(func, tensor: Tensor, *_):
    if isinstance(tensor, PretendTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
    return pinned(tensor.clone())


def pinned(tensor: Tensor) -> Tensor:
    tensor.is_pretend_pinned = True
    return tensor


MOVES = {
    "to": _to, "cpu": _cpu, "cuda": _cuda, "tolist": _tolist, "numpy": _numpy,
    "__array__": _numpy, "pin_memory": _pin_memory,
    "is_pinned": lambda func, tensor, *_: getattr(tensor, "is_pretend_pinned", False),
    "record_stream": lambda func, tensor, *_: None,
}  # fmt: skip


# What reaches the kernels.


def run(func, args: tuple, kwargs: dict):
    """An operation with at least one tensor of a GPU."""
    name, tensors = func._schema.name, tensors_in(args, kwargs)
    place = check_places(name, tensors)
    note_waits(name, args, kwargs)
    world().kernels[name, place.index] += 1
    with world().at(None):
        raws = swapped(args, PretendTensor, _raw)
        out = func(*raws, **{k: swapped(v, PretendTensor, _raw) for k, v in kwargs.items()})
    out = swapped(out, Tensor, lambda t: PretendTensor(t, place))
    if name == "aten::copy_" and not isinstance(args[0], PretendTensor):
        return args[0]  # to the host
    return return_and_correct_aliasing(func, args, kwargs, out)


def check_places(name: str, tensors: list[Tensor]) -> torch.device:
    """The one device of an operation; raises as CUDA does where there are several.

    A tensor of a single number may stay on the host, as it may there.
    """
    places = [t.place for t in tensors if isinstance(t, PretendTensor)]
    others = {place_of(t) for t in tensors if t.dim() or isinstance(t, PretendTensor)}
    if name not in MAY_MIX and len(others) > 1:
        found = " and ".join(sorted(map(str, others), reverse=True))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{found}! ({name})"
        )
    if name == "aten::index" and not isinstance(tensors[0], PretendTensor):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    return places[0]


def note_waits(name: str, args: tuple, kwargs: dict) -> None:
    """Note what an operation copies between host and device."""
    if name == "aten::copy_":
        target, source, *rest = args
        non_blocking = bool(kwargs.get("non_blocking", rest[0] if rest else False))
        if not isinstance(target, PretendTensor):
            note_to_host("copy_", waits=not non_blocking)
        elif not isinstance(source, PretendTensor):
            note_to_device("copy_", source, non_blocking=non_blocking)
    elif name in WAITS:
        is_sized = kwargs.get("output_size") is not None
        if not (name == "aten::repeat_interleave" and is_sized):
            note_to_host(name.removeprefix("aten::"))
    elif name.startswith("aten::index"):
        masks = [t for t in tensors_in(args[1:2], {}) if t.dtype in (torch.bool, torch.uint8)]
        is_fill = name.startswith("aten::index_put") and args[2].numel() == 1
        if masks and not is_fill:
            note_to_host(f"{name.removeprefix('aten::')} by a mask")
    elif name in ("aten::_grouped_mm", "aten::grouped_mm"):
        major = world().driver.gpus[args[0].place.index].capability[0]
        if major not in GROUPED_CAPABILITIES or args[0].dtype != torch.bfloat16:
            note_to_host("group sizes of grouped_mm")


class ByName(TorchFunctionMode):
    """Calls of Python that name a device, or move a plain tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            return pinned(func(*args, **kwargs))
        if any(issubclass(t, PretendTensor) for t in types):
            return func(*args, **kwargs)  # its own class sees to it
        name = getattr(func, "__name__", "")
        names_cuda = kwargs.get("device") is not None and _is_cuda(kwargs["device"])
        moves = name in MOVES and args and isinstance(args[0], Tensor)
        if names_cuda or moves:
            return call(func, args, kwargs)
        with world().at(None):
            return func(*args, **kwargs)


def _is_cuda(wish) -> bool:
    return isinstance(wish, int) or torch.device(wish).type == "cuda"


class ByKernel(TorchDispatchMode):
    """Tensors that C++ makes on its way (a `zeros` inside another operation) are where it works."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, place = kwargs or {}, world().place
        tensors = tensors_in(args, kwargs)
        if any(isinstance(t, PretendTensor) for t in tensors):
            return run(func, args, kwargs)
        with world().at(None):
            out = func(*args, **kwargs)
        if place is None or tensors:
            return out
        return swapped(out, Tensor, lambda t: PretendTensor(t, place))


@contextmanager
def pretend_tensors(driver: Driver) -> Iterator[World]:
    """Tensors may live on the driver's GPUs, on this thread, until the block ends."""
    _foreach_supported_types.append(PretendTensor)
    try:
        with (
            pytest.MonkeyPatch.context() as monkeypatch,
            entered(World(driver)) as new,
            ByKernel(),
            ByName(),
        ):
            monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
            _translate_autocast(monkeypatch)
            yield new
    finally:
        _foreach_supported_types.remove(PretendTensor)


def _translate_autocast(monkeypatch) -> None:
    """The C++ side takes pretend tensors for CPU tensors: autocast of CUDA is that of the CPU."""
    for name in (
        "set_autocast_enabled",
        "is_autocast_enabled",
        "set_autocast_dtype",
        "get_autocast_dtype",
    ):
        original = getattr(torch, name)

        def translated(device_type="cuda", *rest, _original=original):
            if isinstance(device_type, bool):  # set_autocast_enabled(True) is CUDA's
                return _original("cpu", device_type)
            return _original("cpu" if device_type == "cuda" else device_type, *rest)

        monkeypatch.setattr(torch, name, translated)


def _grouped(tensorlistlist, with_indices: bool = False) -> dict:
    """As PyTorch's own, which asks C++ for the device."""
    groups: dict = {}
    for index, first in enumerate(tensorlistlist[0]):
        lists, indices = groups.setdefault(
            (place_of(first), first.dtype), ([[] for _ in tensorlistlist], [])
        )
        for own, source in zip(lists, tensorlistlist, strict=True):
            if source:
                own.append(source[index])
        if with_indices:
            indices.append(index)
    return groups
