"""A decoder layer's run over one batch, kept up to its FFN's output.

What comes before the FFN's output, the attention above all, does not depend on it: while a tape
plays, the modules that came before return what they returned, and the FFN another output.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Tape:
    """What a layer's modules returned for one batch.

    Attributes:
        results: Module -> its result, of those that ended before the FFN began.
        ffn: The outermost module whose result is the FFN's output as it is.
        output: The FFN's output.
    """

    results: Mapping[nn.Module, Any]
    ffn: nn.Module
    output: Tensor

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors([self.output, *self.results.values()]))

    @contextmanager
    def playing(self, output: Tensor) -> Iterator[None]:
        """Within the block, the layer's FFN returns ``output``, and what came before is not run."""
        constants = {**self.results, self.ffn: output}
        with replaced_forwards({module: _constant(value) for module, value in constants.items()}):
            yield


class Recorder:
    """Within its block, hears what a layer's modules return.

    Args:
        layer: The decoder layer.
        leaf: The outgoing leaf of one of its FFNs.
    """

    def __init__(self, layer: nn.Module, leaf: nn.Module) -> None:
        self._way = [m for m in layer.modules() if any(part is leaf for part in m.modules())]
        self._beside = {
            child: parent
            for parent in self._way[:-1]
            for child in parent.children()
            if all(child is not module for module in self._way)
        }
        self._results: dict[nn.Module, list[Any]] = {}
        self._late: set[nn.Module] = set()  # called behind the FFN
        self._passed = False
        self._handles = ExitStack()

    def __enter__(self) -> "Recorder":
        hooked = [
            *(module.register_forward_hook(self._hear) for module in (*self._beside, *self._way)),
            self._way[-1].register_forward_hook(self._pass, prepend=True),
        ]
        for handle in hooked:
            self._handles.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _hear(self, module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG002
        if self._passed and module in self._beside:
            self._late.add(module)
        else:
            self._results.setdefault(module, []).append(result)

    def _pass(self, module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG002
        self._passed = True

    def tape(self) -> Tape | None:
        """Return what was heard; None where the leaf was not called just once."""
        found = self._results.get(self._way[-1], [])
        if len(found) != 1 or not isinstance(found[0], Tensor):
            return None
        output = found[0]
        same = (module for module in self._way[1:] if self._returned(module, output))
        ffn = next(same, self._way[-1])
        outside = self._way[: self._way.index(ffn)]
        results = {
            module: self._results[module][0]
            for module, parent in self._beside.items()
            if parent in outside
            and module not in self._late
            and len(self._results.get(module, ())) == 1
        }
        return Tape(results, ffn, output)

    def _returned(self, module: nn.Module, output: Tensor) -> bool:
        results = self._results.get(module, [])
        return len(results) == 1 and results[0] is output


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, modules run other functions than their forward."""
    own: dict[Any, Any] = {m: m.__dict__.get("forward") for m in forwards}  # set by dispatchers
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _constant(value: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        return value

    return forward


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
