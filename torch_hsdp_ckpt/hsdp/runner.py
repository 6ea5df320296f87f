"""Running a wrapped module: gather before its forward, free after, whichever face it was wrapped
with."""

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import _global_backward_hooks

from .. import _C
from ..common.gate import wait_at_gate
from .adoption import adopt_everywhere
from .async_inputs import finished
from .eager import keep_dynamo_out
from .module_tree import RUNNER, modules_of_unit, without_wrappers
from .precision import Precision
from .results import Results, sequence_number, with_gathered_steps
from .root import BackwardEnd, Root
from .transforms import check_not_traced, in_transform, makes_hidden_graph, outside_of_transforms
from .unit import ShardedUnit


class Runner:
    """What a wrapped ``module`` has in common under ``FullyShardedDataParallel`` and
    ``fully_shard``.

    ``units``: of its parameters, one for each mesh that these are sharded over; a module without
    parameters has one too. They run as if each was a module around the next one. ``prefetch``: when
    backward starts the next unit's gather; the outermost module's counts.
    ``label``: what the module is called in errors, if it is not its own class. ``ignored``: modules
    whose buffers stay as they are."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[ShardedUnit],
        prefetch: _C.BackwardPrefetch,
        precision: Precision,
        label: str,
        ignored: Collection[nn.Module] = (),
    ) -> None:
        self.units = tuple(units)
        self.prefetch = prefetch
        self.precision = precision
        self.label = label
        self.ignored = ignored
        self._root: Root | None = None
        self._backward_end = BackwardEnd()
        # There are several where modules that were given together are one unit.
        self._modules: list[weakref.ref[nn.Module]] = []
        self._input_dtype: torch.dtype | None = None  # what floating point inputs are cast to
        self._results = Results()
        # Whoever makes the root, or reads while there is none, holds it.
        self._rootless = threading.RLock()
        self._inside: list[weakref.ref[nn.Module]] | None = None  # all modules of the unit
        self.add(module)
        self._name_units(label)
        keep_dynamo_out()

    def _name_units(self, name: str) -> None:
        for unit in self.units:
            where = "" if unit is self.units[0] else f", on a mesh of {tuple(unit.mesh.shape)}"
            unit.core.name = name + where

    @property
    def name(self) -> str:
        """What the module is called in errors."""
        return self.units[0].core.name

    @property
    def root(self) -> Root | None:
        """None before the outermost module is known: until the first use, and after a module around
        it or another one has become the root of what is wrapped inside."""
        root = self._root
        return None if root is None or root.is_dissolved else root

    @property
    def backward_end(self) -> BackwardEnd:
        """The outermost module's, once that is known."""
        return self._backward_end if self.root is None else self.root.backward_end

    def add(self, module: nn.Module) -> None:
        """Makes ``module`` one of those whose parameters are in this runner's unit."""
        module.__dict__[RUNNER] = self
        self._modules.append(weakref.ref(module))

    def modules(self) -> list[nn.Module]:
        """The modules of the unit that are still there."""
        return [module for reference in self._modules if (module := reference()) is not None]

    def runners_inside(self) -> "list[Runner]":
        """This one and those of wrapped modules inside, outermost first."""
        found: list[Runner] = []
        for module in self.modules():
            found += [runner for _, runner in named_runners(module)]
        return found

    def start_unshard(self) -> None:
        """Starts the gather of the unit outside of a forward."""
        root = self.root_of_all()
        self._check_materialized()
        with root.turn():
            for unit in self.units:
                root.schedule.start_unshard(unit.core)

    def _check_materialized(self) -> None:
        for unit in self.units:
            unit.check_materialized()

    def unshard(self) -> None:
        """Gathers outside of a forward; the module shows the full parameters when this returns."""
        root = self.root_of_all()
        self._check_materialized()
        with root.turn():
            for unit in self.units:
                root.schedule.unshard(unit.core)
                unit.show_full()

    def free(self) -> None:
        """Ends ``unshard``, or what a setting has kept after forward or backward."""
        if (root := self.root) is None:
            return
        with root.turn():
            for unit in self.units:
                root.schedule.release(unit.core)
                unit.show_sharded()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)`` on the full parameters. If it raises they are freed, and the
        module can be used again."""
        check_not_traced(self.name)
        with outside_of_transforms():
            root = self.root_of_all()
            for unit in self.units:
                unit.before_use()
        try:
            return self._run_forward(root, call, args, kwargs)
        except BaseException:
            self._abort_forward(root)
            raise

    def _run_forward(
        self, root: Root, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._input_dtype is not None:
            args, kwargs = self.precision.cast_inputs(self._input_dtype, args, kwargs)
        self._enter(root)
        args, kwargs = finished(args, kwargs)
        since = sequence_number()
        outputs = with_gathered_steps(call(*args, **kwargs), self.run)
        outputs = self.precision.cast_outputs(outputs)
        self._leave(root, outputs, (args, kwargs), since)
        return outputs

    def _enter(self, root: Root) -> None:
        is_outermost = not root.schedule.running_here()
        for unit in self.units:
            root.schedule.enter_forward(unit.core, torch.is_grad_enabled())
        if torch.is_grad_enabled():
            is_watched = self._has_backward_hooks()
            for unit in self.units:
                unit.core.is_watched = is_watched
        if makes_hidden_graph() and not root.in_backward():
            root.schedule.expect_hidden_graph()
        if is_outermost:
            root.hide_freed()  # what the last pass has kept, and this one may not call
            root.free_unheld_gradients()
        for unit in self.units:
            unit.show_full()

    def _leave(self, root: Root, outputs: Any, arguments: Any, since: int) -> None:
        if not root.in_backward():
            # This comes before the forward is left: then another thread may read.
            self._show_sharded()
        announcing: list[torch.Tensor] = []
        if not in_transform():
            announcing = self._results.find(outputs, arguments, self.modules, since)
        for unit in reversed(self.units):
            root.schedule.leave_forward(unit.core, announcing)

    def _show_sharded(self) -> None:
        for unit in self.units:
            unit.show_sharded()

    def _has_backward_hooks(self) -> bool:
        """Whether hooks of a user's run in the backward of the unit's modules: they may read
        parameters whose gradients are there already."""
        if self._inside is None:
            self._inside = [
                weakref.ref(module) for outer in self.modules() for module in modules_of_unit(outer)
            ]
        inside = (module for reference in self._inside if (module := reference()) is not None)
        return bool(_global_backward_hooks) or any(
            module._backward_hooks or module._backward_pre_hooks for module in inside
        )

    def show_kept(self) -> None:
        """After forward: shows the full parameters that it was told to keep for backward, as
        torch's FSDP2 does. A loss that uses the head's weight, say, then gives it a gradient.

        What is only kept because backward needs it next, the module that ran last, is not shown:
        whether there is one depends on the calls."""
        root = self.root_of_all()
        policies = [_C.ReshardAfterForward.NEVER]
        if self.units[0] is root.units[0]:
            policies.append(_C.ReshardAfterForward.UNLESS_BACKWARD_IS_NEXT)
        kept = [unit for unit in self.units if unit.core.reshard_after_forward in policies]
        if not kept or root.in_backward() or in_transform():
            return
        with root.turn():
            for unit in kept:
                if unit.core.is_unsharded:  # no forward of another thread has come in between
                    unit.show_full()

    def _abort_forward(self, root: Root) -> None:
        # A recomputation ends by an error when it has computed enough, and backward goes on with
        # the full parameters.
        if root.in_backward() or not root.schedule.running_here():  # else it has not begun
            return
        self._show_sharded()
        for unit in reversed(self.units):
            root.schedule.abort_forward(unit.core)
        root.hide_freed()

    def reading(self, whole: str = "") -> AbstractContextManager[None]:
        """``Root.reading``, also before there is a root, which then is not made meanwhile."""
        root = self.root
        return self._reading_alone(whole) if root is None else root.reading(whole)

    @contextmanager
    def _reading_alone(self, whole: str) -> Iterator[None]:
        with self._while_rootless():
            if (root := self.root) is None:
                yield
                return
        with root.reading(whole):
            yield

    @contextmanager
    def _while_rootless(self) -> Iterator[None]:
        """Within the block nobody else makes a root for this module, or for one inside. Roots of
        other models, with other ranks, may be made."""
        in_one_order = sorted(set(self.runners_inside()), key=id)  # whichever module is asked
        with ExitStack() as locks:
            for runner in in_one_order:
                locks.enter_context(runner._rootless)
            yield

    def root_of_all(self) -> Root:
        """The root of the outermost module; made if there is none, which is collective over the
        mesh: at the first use of an outermost module, for all that are wrapped inside. Those that
        have been used on their own, or within another module, leave that root, which is none any
        more: so the whole of a model is one order, whatever part ran first."""
        if (root := self.root) is not None:
            return root
        with self._while_rootless():
            return self.root or self._make_root()

    @_disable_dynamo  # a compiled model would be traced into groups and agreements
    def _make_root(self) -> Root:
        named = list(named_runners(self.modules()[0]))
        inside = [runner for _, runner in named]
        for former in {runner.root for runner in inside if runner.root is not None}:
            former.dissolve()
        for name, runner in named:
            runner._prepare(name or "(outermost)", is_outermost=runner is self)
        units = [unit for runner in inside for unit in runner.units]
        root = Root(units, self.prefetch, self._backward_end)
        for runner in inside:
            runner._root = root
        adopt_everywhere()
        return root

    def _prepare(self, name: str, is_outermost: bool) -> None:
        """What a unit learns when its outermost module is known."""
        self._name_units(f"{name} ({self.label})")
        self._input_dtype = self.precision.input_dtype(is_outermost)
        self.cast_buffers()

    def cast_buffers(self) -> None:
        """Gives the buffers of the unit's modules the dtype that mixed precision asks for."""
        for module in self.modules():
            self.precision.cast_buffers(module, self.ignored)

    def reset(self) -> None:
        """The sharded parameters are in their slots and nothing derived from them is in flight."""
        if (root := self.root) is not None:
            root.reset()

    def drop_gradients(self) -> None:
        """Forgets, before ``zero_grad``, gradients that wait for a backward that reduces, here and
        in wrapped modules inside."""
        self.reset()
        if (root := self.root) is None:
            return
        units = root.units
        if self.units[0] is not units[0]:
            units = [unit for inner in self.runners_inside() for unit in inner.units]
        with root.turn():
            for unit in units:
                unit.core.drop_kept()

    def apply_to_shards(self, apply: Callable[[], Any]) -> None:
        """Runs ``to``, ``double``, ``cuda`` and the like on the shards, whose memory is bound again
        afterwards."""
        wait_at_gate()
        self.reset()
        for unit in self.units:
            unit.forget_kept_gradients()
        apply()
        self.rebind()

    def rebind(self) -> None:
        """See :meth:`ShardedUnit.rebind`."""
        for unit in self.units:
            unit.rebind()


def runner_of(module: nn.Module) -> Runner | None:
    """The module's own runner; None if it is not wrapped."""
    found: Runner | None = module.__dict__.get(RUNNER)
    return found


def named_runners(module: nn.Module) -> Iterator[tuple[str, Runner]]:
    """The runners of ``module`` and all inside, outermost first, each once, with the names that the
    modules have without wrappers."""
    seen: set[int] = set()
    for name, inner in module.named_modules():
        runner = runner_of(inner)
        if runner is not None and id(runner) not in seen:
            seen.add(id(runner))
            yield without_wrappers(name), runner
