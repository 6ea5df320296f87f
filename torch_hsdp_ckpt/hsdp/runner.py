"""Running a wrapped module: gather before its forward, free after, whichever face it was wrapped
with."""

import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .. import _C
from ..common.gate import wait_at_gate
from .eager import keep_dynamo_out
from .precision import Precision
from .root import Root, flat_tensors
from .unit import ShardedUnit

_ATTRIBUTE = "_hsdp_runner"


class Runner:
    """What a wrapped ``module`` has in common under ``FullyShardedDataParallel`` and
    ``fully_shard``.

    ``prefetch``: when backward starts the next unit's gather; the outermost module's counts.
    ``label``: what the module is called in errors, if it is not its own class. ``ignored``: modules
    whose buffers stay as they are."""

    def __init__(
        self,
        module: nn.Module,
        unit: ShardedUnit,
        prefetch: _C.BackwardPrefetch,
        precision: Precision,
        label: str,
        ignored: Collection[nn.Module] = (),
    ) -> None:
        self.unit = unit
        self.prefetch = prefetch
        self.precision = precision
        self.label = label
        self.ignored = ignored
        self.root: Root | None = None
        self.last_backward = True
        self.modules: list[
            weakref.ref[nn.Module]
        ] = []  # several: one unit for modules that were given together
        self._cast_inputs: torch.dtype | None = None
        self._rootless = threading.RLock()  # whoever makes the root, or reads while there is none
        self.add(module)
        unit.core.name = label
        keep_dynamo_out()

    def add(self, module: nn.Module) -> None:
        module.__dict__[_ATTRIBUTE] = self
        self.modules.append(weakref.ref(module))

    def hold(self, wait: bool) -> None:
        """Gathers outside of a forward; with ``wait`` the module shows the full parameters when
        this returns."""
        root = self.root or self.make_root()
        with root.turn():
            if not wait:
                root.schedule.start_unshard(self.unit.core)
                return
            root.schedule.unshard(self.unit.core)
            self.unit.show_full()

    def free(self) -> None:
        """Ends ``hold``, or what a setting has kept after forward or backward."""
        if self.root is None:
            return
        with self.root.turn():
            self.root.schedule.release(self.unit.core)
            self.unit.show_sharded()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)`` on the full parameters. If it raises they are freed, and the
        module can be used again."""
        root, unit = self.root, self.unit
        if root is None:
            root = self.make_root()
        unit.before_use()
        try:
            if self._cast_inputs is not None:
                args, kwargs = self.precision.cast_inputs(self._cast_inputs, args, kwargs)
            watched = flat_tensors((args, kwargs)) if unit.core.frozen else ()
            root.schedule.enter_forward(unit.core, torch.is_grad_enabled(), watched)
            unit.show_full()
            outputs = call(*args, **kwargs)
            if self.precision.output_dtype is not None:
                outputs = self.precision.cast_outputs(outputs)
            if not root.in_backward():
                # first: when the outermost forward is left, another thread may read
                unit.show_sharded()
            root.schedule.leave_forward(unit.core, flat_tensors(outputs))
        except BaseException:
            if root.schedule.running_here():  # if not, it has not begun
                unit.show_sharded()
                root.schedule.abort_forward(unit.core)
            raise
        return outputs

    def reading(self, whole: str = "") -> AbstractContextManager[None]:
        """``Root.reading``, also before there is a root, which then is not made meanwhile."""
        return self._reading_alone(whole) if self.root is None else self.root.reading(whole)

    @contextmanager
    def _reading_alone(self, whole: str) -> Iterator[None]:
        with self._while_rootless():
            if self.root is None:
                yield
                return
        with self.root.reading(whole):
            yield

    @contextmanager
    def _while_rootless(self) -> Iterator[None]:
        """Nobody else makes a root for this module, or for one inside. Other models' may be made,
        with other ranks."""
        modules = [module for reference in self.modules if (module := reference()) is not None]
        runners = {runner for module in modules for _, runner in named_runners(module)}
        with ExitStack() as locks:
            for runner in sorted(runners, key=id):  # one order, whichever of the modules is asked
                locks.enter_context(runner._rootless)
            yield

    def make_root(self) -> Root:
        """At the first use of an outermost module: one schedule for all that are wrapped inside.
        Collective over the mesh."""
        with self._while_rootless():
            return self.root or self._make_root()

    def _make_root(self) -> Root:
        module = self.modules[0]()
        assert module is not None
        inside = list(named_runners(module))
        if any(runner.root is not None for _, runner in inside):
            raise RuntimeError(
                "a wrapped module has been run on its own before the wrapper around it: call the "
                "outermost module first"
            )
        for name, runner in inside:
            runner.unit.core.name = f"{name or '(outermost)'} ({runner.label})"
        for runner in (r for _, r in inside):
            runner._cast_inputs = runner.precision.input_dtype(outermost=runner is self)
            runner.cast_buffers()
        root = Root([runner.unit for _, runner in inside], self.prefetch)
        root.schedule.set_last_backward(self.last_backward)
        for _, runner in inside:
            runner.root = root
        return root

    def cast_buffers(self) -> None:
        for reference in self.modules:
            if (owner := reference()) is not None:
                self.precision.cast_buffers(owner, self.ignored)

    def reset(self) -> None:
        """The sharded parameters are in their slots and nothing derived from them is in flight."""
        if self.root is not None:
            self.root.reset()

    def drop_gradients(self) -> None:
        """Before ``zero_grad``: forgets gradients that wait for a backward that reduces, here and
        in wrapped modules inside."""
        self.reset()
        if (root := self.root) is None:
            return
        units = root.units if self.unit is root.units[0] else self._units_inside()
        with root.turn():
            for unit in units:
                unit.core.drop_kept()

    def _units_inside(self) -> list[ShardedUnit]:
        modules = [module for reference in self.modules if (module := reference()) is not None]
        return [runner.unit for module in modules for _, runner in named_runners(module)]

    def apply_to_shards(self, apply: Callable[[], Any]) -> None:
        """``to``, ``double``, ``cuda`` and the like: on the shards, whose memory is bound again
        afterwards."""
        wait_at_gate()
        self.reset()
        self.unit.release()
        apply()
        self.unit.rebind()


def runner_of(module: nn.Module) -> Runner | None:
    """The module's own, if it is wrapped."""
    found: Runner | None = module.__dict__.get(_ATTRIBUTE)
    return found


def named_runners(module: nn.Module) -> Iterator[tuple[str, Runner]]:
    """Of ``module`` and all inside, outermost first, by the names that the modules have without
    wrappers. Each once."""
    seen: set[int] = set()
    for name, inner in module.named_modules():
        runner = runner_of(inner)
        if runner is not None and id(runner) not in seen:
            seen.add(id(runner))
            yield (name + ".").replace("_checkpoint_wrapped_module.", "").strip("."), runner
