"""What operators read and write, counted from their schemas: the accesses that the benchmarks state are held to it."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AccessCounter(TorchDispatchMode):
    """Reads and writes of large tensors, from the operators' schemas: what aliases is written, what is fresh too."""

    # A scalar per tensor and the views behind `p.data` are not traffic.
    LARGE = 1000
    UNREAD = ("copy_", "_foreach_copy_", "add.out", "mul.out")  # their first or `out` operand is written only
    NO_TRAFFIC = ("empty_like", "detach", "alias", "view")

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def _large(self, value: object) -> dict[int, int]:
        return {
            leaf.data_ptr(): leaf.numel()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.numel() >= self.LARGE
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__.removesuffix(".default")
        if name.split(".")[0] in self.NO_TRAFFIC:
            return result
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            # The fused optimizers may unscale gradients in place; without a scaler they only read them.
            mutated = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
            if mutated:
                written |= self._large(value)
            if not (mutated and name in self.UNREAD):
                read |= self._large(value)
        if not any(ret.alias_info for ret in func._schema.returns):
            written |= self._large(result)
        self.elements += sum(read.values()) + sum(written.values())
        return result
