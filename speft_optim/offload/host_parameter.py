"""A parameter in host memory that is updated before it is used, and copied to the device by whole pages.

While a model is trained with its base in host memory, the newest values of masked entries are on the device, and
writing them into the host's weight at each step would cost more than the step. So the weight is updated lazily, when it
is used: by `state_dict()`, `save_pretrained`, `copy_`, a metric, or reading its entries. All of these go through
`__torch_function__`, so no list of such places is needed. Reading only metadata, such as the shape, does not update it.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from speft_optim.offload.host_weight import HostWeight

_GETTERS = (
    "shape dtype device layout grad requires_grad is_leaf grad_fn _version is_meta is_cpu is_cuda is_sparse is_nested "
    "is_quantized itemsize nbytes ndim"
).split()
_METHODS = (
    "size dim numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex is_pinned "
    "is_inference data_ptr requires_grad_ __len__ __hash__ register_hook register_post_accumulate_grad_hook"
).split()
# These read no entry of a weight. `data_ptr` is among them, since version counters are compared beside it.
OF_FORM = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS]
    + [getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)


class HostParameter(nn.Parameter):
    """A frozen weight in host memory, of which a device computes with copies; trained entries of it are on the device.

    The class of a parameter is changed to this one in place, and back; copies are plain parameters.

    Attributes:
        behind: what brings it up to date.
    """

    behind: "HostWeight"

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
        """Return an ordinary parameter, for tools that make a parameter of an old one's class."""
        return nn.Parameter(data, requires_grad)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Bring the weights among the arguments up to date, and call the function on them as on plain parameters."""
        kwargs = kwargs or {}
        if function in (Tensor.to, Tensor.cuda) and isinstance(args[0], HostParameter):
            if _goes_to(args[0].behind.device, function, args, kwargs):
                return function(on_device(args[0]), *args[1:], **kwargs)
        if function not in OF_FORM:
            for argument in tree_leaves((args, kwargs)):
                if isinstance(argument, HostParameter):
                    argument.behind.settle()
        return plainly(function, *args, **kwargs)


def on_device(parameter: HostParameter) -> Tensor:
    """Return a copy of a parameter on its device, which passes its gradient on."""
    return _Copy.apply(parameter)


class _Copy(torch.autograd.Function):
    """CUDA refuses a copy of a weight whose memory is locked but for its first and last page, so this is by pages."""

    @staticmethod
    def forward(ctx, parameter: HostParameter) -> Tensor:
        return parameter.behind.whole()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.cpu()


def _goes_to(device: torch.device, function, args: tuple, kwargs: dict) -> bool:
    """Return whether a function moves its first argument to a device of this kind, which is not the CPU."""
    return device.type != "cpu" and function(torch.empty(0), *args[1:], **kwargs).device.type == device.type


def plainly(function, *args, **kwargs):
    """Call a function of torch on parameters as they are, up to date or not."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


@functools.cache
def host_class(kind: type) -> type:
    """Return the class in host memory of a parameter of class `kind`."""
    return HostParameter if kind is nn.Parameter else type(kind.__name__, (HostParameter, kind), {})
