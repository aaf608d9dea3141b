"""A GPU that need not be there: tensors of "cuda" have a shape and no numbers, those of the CPU are real, and whatever would make the CPU wait for the GPU is refused."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


_SAID = {"torch.cuda.amp.common.amp_definitely_not_available": False, "torch.cuda.is_bf16_supported": True}


class Waits(AssertionError):
    "The CPU would wait until the GPU has done everything that was asked of it before."


def _apply(module, fn, recurse=True):
    "nn.Module._apply with new parameters in place of the old ones; torch swaps them, which fake tensors do not allow."
    for child in module.children():
        child._apply(fn)
    for key, p in module._parameters.items():
        module._parameters[key] = p if p is None else torch.nn.Parameter(fn(p.detach()), p.requires_grad)
    for key, b in module._buffers.items():
        module._buffers[key] = b if b is None else fn(b)
    return module


def _with_storage(t):
    "A number's tangent in forward mode is zeros without storage, in which FakeTensorMode looks for its value: write them."
    if isinstance(t, FakeTensor) or not t._is_zerotensor():
        return t
    with unset_fake_temporarily():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)


class FakeGPU(TorchDispatchMode):
    """Inside the block, operators on "cuda" run on shapes alone.

    What waits: reading a value (FakeTensorMode raises), a copy to the CPU, a copy from it that is not asynchronous
    from page-locked memory, and an index that lies on the CPU. What mixes devices is an error in any case.
    """

    def __init__(self, device="cuda"):
        super().__init__()
        self.fake, self.device, self.pinned = FakeTensorMode(allow_non_fake_inputs=True), device, []
        self.may_wait = True

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        for name, answer in _SAID.items():
            self.stack.enter_context(mock.patch(name, lambda *args, answer=answer: answer))
        self.stack.enter_context(self.fake)  # below this mode: what is not answered here comes to it
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    @contextmanager
    def no_wait(self):
        "While the block runs, whatever waits is an error."
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def is_pinned(self, t):
        return any(t.untyped_storage()._cdata == p.untyped_storage()._cdata for p in self.pinned)

    def check(self, func, args, kwargs):
        "Refuse what waits, before it is done."
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        away = [t for t in given if isinstance(t, FakeTensor)]
        here = [t for t in given if not isinstance(t, FakeTensor)]
        if func in COPIES:
            source = args[0] if func is aten._to_copy.default else args[1]
            to = torch.device(kwargs.get("device") or args[0].device).type
            asynchronous = kwargs.get("non_blocking") or func is aten.copy_.default and args[2:] == (True,)
            if isinstance(source, FakeTensor) and to == "cpu":
                raise Waits(f"{func}: {tuple(source.shape)} is copied to the CPU")
            if not isinstance(source, FakeTensor) and to != "cpu" and not (asynchronous and self.is_pinned(source)):
                raise Waits(f"{func}: {tuple(source.shape)} is copied from the CPU, not asynchronously: use send")
        elif away and any(t.ndim for t in here):
            raise Waits(f"{func}: works on {len(here)} tensors of the CPU and {len(away)} of the GPU")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.Tensor, _with_storage, (args, kwargs or {}))
        if func is aten._pin_memory.default:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        fakes = any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if not fakes and (device is None or torch.device(device).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not self.may_wait:
            self.check(func, args, kwargs)
        return func(*args, **kwargs)


def _leaves(loss):
    "The tensors whose `.grad` a backward pass from here would fill in."
    todo, met = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [n for n, _ in node.next_functions]


def _backward(loss, *args, **kw):
    "Tensor.backward without a GPU: every leaf gets a gradient of its shape, where it lies."
    for t in _leaves(loss):
        t.grad = torch.empty_like(t)


def _grad(out, x, *args, **kw):
    "torch.autograd.grad without a GPU: something of the shape of x that depends on what `out` depends on."
    return (x * out,)


@contextmanager
def without_backward():
    "While the block runs, backward passes, which have no GPU to run on, are left out; all around them is done."
    with mock.patch.object(torch.Tensor, "backward", _backward), mock.patch.object(torch.autograd, "grad", _grad):
        yield


def left_behind(module, device="cuda"):
    "Names of the parameters and buffers of a module that are not on the device."
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, t in named if t.device.type != device]
