"""What a unit's forward leaves behind: the tensors whose gradients announce its backward, and
generators that have yet to run."""

import types
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.utils._pytree import tree_map_only

from .flat_tensors import new_tensors, tensors_of_graph
from .module_tree import RUNNER, modules_of_unit

# The attributes that every module has hold no results, nor do a wrapper's own; buffers may.
_WRAPPERS = {RUNNER, "_runner", "_unit", STATE_KEY, REGISTRY_KEY}
_WITHOUT_RESULTS = (frozenset(vars(nn.Module())) - {"_buffers"}) | _WRAPPERS

# The number of the next node of autograd's graph, in this thread.
sequence_number = torch._C._autograd._get_sequence_nr


class _Attribute(NamedTuple):
    """A place in a module where its forward keeps a result."""

    module: weakref.ref[nn.Module]
    name: str

    def value(self) -> Any:
        module = self.module()
        return None if module is None else vars(module).get(self.name)


class Results:
    """Finds the tensors of one unit's forward that have a graph.

    They are in what it returns. But a forward may also keep some in its modules (a loss for
    balance), or, if it returns none, put them into what it was given. Attributes are looked through
    once, and again whenever nothing is returned; the ones that have held results are remembered."""

    def __init__(self) -> None:
        self._attributes: list[_Attribute] | None = None

    def find(
        self,
        outputs: Any,
        arguments: Any,
        modules: Callable[[], Iterable[nn.Module]],
        since: int,
    ) -> list[torch.Tensor]:
        """``arguments``: what forward was given; ``modules``: gives the unit's; ``since``:
        autograd's sequence number when it began."""
        found = tensors_of_graph(outputs, since)
        # Without gradients DTensor's functions are counted too, though they make no graph.
        if sequence_number() == since or not torch.is_grad_enabled():
            return found
        if self._attributes is None or not found:
            self._attributes = _attributes_with_results(modules(), since)
        if self._attributes:
            kept = [attribute.value() for attribute in self._attributes]
            found += tensors_of_graph(new_tensors(kept, since), since)
        return found or tensors_of_graph(new_tensors([arguments], since), since)


def _attributes_with_results(modules: Iterable[nn.Module], since: int) -> list[_Attribute]:
    return [
        _Attribute(weakref.ref(module), name)
        for outermost in modules
        for module in modules_of_unit(outermost)
        for name, value in vars(module).items()
        if name not in _WITHOUT_RESULTS and new_tensors([value], since)
    ]


class _Over(NamedTuple):
    """What a generator's last step gives; ``value``: that of its return."""

    value: Any


class GatheredGenerator(Generator[Any, Any, Any]):
    """A generator that a forward has returned. Its code has yet to run, so that each step of it is
    a call of its own: ``run`` gathers before it and frees after."""

    def __init__(self, inner: Generator[Any, Any, Any], run: Callable[..., Any]) -> None:
        self._inner, self._run = inner, run

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        self._inner.close()

    def _step(self, advance: Callable[..., Any], *args: Any) -> Any:
        result = self._run(_advanced, (advance, *args), {})
        if isinstance(result, _Over):
            raise StopIteration(result.value)
        return result


def _advanced(advance: Callable[..., Any], *args: Any) -> Any:
    """A generator's next value. Its end is no error of the forward that it runs in."""
    try:
        return advance(*args)
    except StopIteration as end:
        return _Over(end.value)


def with_gathered_steps(outputs: Any, run: Callable[..., Any]) -> Any:
    """A module's result, with the generators in it as ``GatheredGenerator``s."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, (tuple, list)):
        has_generator = any(isinstance(item, types.GeneratorType) for item in outputs)
    elif isinstance(outputs, dict):
        has_generator = any(isinstance(item, types.GeneratorType) for item in outputs.values())
    else:
        has_generator = isinstance(outputs, types.GeneratorType)
    if not has_generator:
        return outputs
    return tree_map_only(
        types.GeneratorType, lambda generator: GatheredGenerator(generator, run), outputs
    )
