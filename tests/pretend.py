"""A GPU that is none: tensors that say they lie on `cuda:0`, are computed by the CPU, and refuse to meet the CPU's own.

So a whole run on it shows a tensor or a generator that was left behind, and its numbers show a branch for GPUs that
computes something else. It shows nothing of speed, memory, streams, a GPU's own random numbers, or types and shapes
that its kernels lack; what torch tells itself in a backward pass about the CPU is taken to mean the GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar
from unittest import mock

import torch
import torch._dynamo  # else the first operation would import it, and meet what `gpu` has put in torch's place
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Generator(torch.Generator):
    """The CPU's, which says where it was asked to be."""

    place: str

    def __new__(cls, device: Any = CPU) -> Generator:
        made = super().__new__(cls, CPU)
        made.place = torch.device(device).type
        return made


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _addmm_out(c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, beta: float = 1,
               alpha: float = 1) -> Tensor:
    return out.copy_(beta * c + alpha * _product(a, b, out_dtype))


# Of 16 bits into float32, which no CPU has.
ONLY_THERE: dict[str, Callable[..., Tensor]] = {"aten.mm.dtype": _product, "aten.bmm.dtype": _product,
                                                "aten.addmm.dtype_out": _addmm_out}
ACROSS = ("aten._to_copy.", "aten.copy_.")  # between devices by their nature
INDEXED = ("aten.index.", "aten.index_put", "aten._index_put_impl_.")  # by an index that may lie on the CPU


class OnGpu(Tensor):
    """A tensor there: `held` is where its numbers really are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, requires_grad=held.requires_grad)

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    # Properties in torch too, which its stubs call attributes.
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_gpu(func, args, kwargs or {})


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnGpu) -> Tensor:
        return x.held.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> OnGpu:
        return OnGpu(grad)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, by our word for where `x` lies, as torch takes a tensor there for one of the CPU."""
    args = tuple(chain.from_iterable((a.device, a.dtype) if isinstance(a, Tensor) else (a,) for a in args))
    places = [torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device)]
    if not places:
        return torch.Tensor.to(x, *args, **kwargs)
    if isinstance(x, OnGpu) and places[0].type == "cpu":
        x = _Down.apply(x)
    told = CPU if isinstance(x, OnGpu) else CUDA if places[0].type == "cuda" else places[0]
    return torch.Tensor.to(x, *[told if isinstance(a, str | torch.device) else a for a in args],
                           **{k: told if isinstance(v, str | torch.device) else v for k, v in kwargs.items()})


def _refuse_mixed(func: Any, args: Sequence[Any], given: Sequence[Tensor]) -> None:
    """RuntimeError for tensors of both devices; one number that goes into a pointwise operation may lie anywhere."""
    if str(func).startswith(ACROSS):
        return
    if str(func).startswith(INDEXED):
        itself, index, *put = args
        if not isinstance(itself, OnGpu) and any(isinstance(i, OnGpu) for i in index):
            raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor")
        given = [itself, *put[:1]]
    foreign = [x for x in given if not isinstance(x, OnGpu)]
    if len(foreign) in (0, len(given)) or _goes_with(func, args, foreign):
        return
    raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two devices, "
                       f"cuda:0 and cpu (of shape {tuple(foreign[0].shape)})")


def _goes_with(func: Any, args: Sequence[Any], foreign: Sequence[Tensor]) -> bool:
    """Are these tensors of the CPU numbers, in a place where a GPU takes one from there?"""
    if any(x.dim() for x in foreign):
        return False
    if str(func).startswith("aten.where."):
        return isinstance(args[0], OnGpu)
    pointwise = torch.Tag.pointwise in func.tags and not (func._schema.is_mutable and args[0] is foreign[0])
    return len(foreign) == 1 and (pointwise or str(func).startswith((*INDEXED, "aten.fill_.", "aten._foreach_")))


def on_gpu(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func` where its tensors are, or where it is told to make one."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, OnGpu) for x in given)
    _refuse_mixed(func, args, given)
    device = kwargs.get("device")
    named = device is not None and torch.device(device).type == "cuda"
    held_args, held = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (tuple(args), dict(kwargs)))
    kernel = ONLY_THERE.get(str(func), func) if there else func
    out = kernel(*held_args, **(held | {"device": CPU} if named else held))
    moved = device == CPU and str(func).startswith(ACROSS)  # by `_to`, for another type: not to the CPU
    if not (named or (there and (device is None or moved)) or ((there or not given) and device == CPU
                                                               and _in_backward())):
        return out
    if str(func).startswith("aten.copy_.") and not isinstance(args[0], OnGpu):
        return args[0]
    out = tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, dict(kwargs), out) if there else out


def _in_backward() -> bool:
    """Does autograd itself ask for a tensor? It wants one where the graph's tensors lie, and says the CPU."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_name in ("on_gpu", "__torch_dispatch__", "inner", "_fn"):  # ours, and torch's around them
        frame = frame.f_back
    return bool(frame.f_code.co_name == "_engine_run_backward")


class _Calls(TorchFunctionMode):
    """Catches the calls in which torch asks a driver, or believes its own word for where a tensor lies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return _to(args[0], CPU)
        if func in (torch.tensor, torch.as_tensor) and (place := kwargs.pop("device", None)) is not None:
            return _to(func(*args, **kwargs), place)
        random = kwargs.get("generator")
        if random is not None and isinstance(args[0], OnGpu) != (getattr(random, "place", "cpu") == "cuda"):
            raise RuntimeError(f"{func}: expected a generator of the device of its tensor")
        return func(*args, **kwargs)


class _Everywhere(TorchDispatchMode):
    """Catches what no tensor leads to: tensors that are made there."""

    supports_higher_order_operators: ClassVar[bool] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_gpu(func, args, kwargs or {})


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """Within it there is a GPU, as far as torch tells."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else a module's parameters would stay plain
    told = {"_lazy_init": lambda: None, "is_available": lambda: True, "current_device": lambda: 0,
            "device_count": lambda: 1, "get_device_name": lambda *_: "none", "mem_get_info": lambda *_: (2**36, 2**36),
            "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None}
    try:
        with contextlib.ExitStack() as stack:
            for name, answer in told.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            stack.enter_context(mock.patch.object(torch, "Generator", Generator))
            stack.enter_context(_Calls())
            stack.enter_context(_Everywhere())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
