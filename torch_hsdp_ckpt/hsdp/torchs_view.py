"""What torch's own code asks of a module under ``fully_shard`` beyond the methods of
``FSDPModule``: its state object, as far as pipelining and ``share_comm_ctx`` look into it."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY, RegistryItem
from torch.distributed.fsdp import fully_shard as _torchs_fully_shard

from .arguments import at
from .backward_end import finalize_backward
from .runner import Runner


class CommContext:
    """Torch has one for all modules that share their streams. Here the process has one set of
    streams a device, and this is a name only."""


class StateContext:
    """What the states of one outermost module share."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner  # not the state, which holds this: models are no reference cycles

    @property
    def all_states(self) -> "list[FSDPState]":
        """Those of the module and of the wrapped modules inside."""
        inside = self._runner.runners_inside()
        return [state for runner in inside if (state := _state_of(runner)) is not None]


class ParamGroup:
    """A unit, for whoever drives it by hand."""

    comm_ctx: CommContext

    def post_backward(self) -> None:
        """Nothing: all units are reduced together, by ``_root_post_backward_final_callback``."""


class FSDPState:
    """Stands where torch's ``FSDPState`` would: torch 2.11's pipelining ends a step by it, 2.15's
    compares its ``_comm_ctx``."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._state_ctx = StateContext(runner)
        self._fsdp_param_groups = [ParamGroup()]
        self.share(CommContext())

    def share(self, context: CommContext) -> None:
        """``context`` is this module's from now on."""
        self._comm_ctx = self._fsdp_param_group.comm_ctx = context

    @property
    def _fsdp_param_group(self) -> ParamGroup:
        return self._fsdp_param_groups[0]

    def _pre_forward(self, *arguments: Any) -> NoReturn:
        """What torch's ``register_fsdp_forward_method`` calls, which has no way to say that the
        method has raised."""
        raise NotImplementedError(
            f"{at(*self.runner.modules())}use torch_hsdp_ckpt.register_fsdp_forward_method for it: "
            "torch's is for modules that torch has wrapped"
        )

    def _root_post_backward_final_callback(self) -> None:
        finalize_backward(self.runner.root, async_op=False)


def state_of(runner: Runner) -> FSDPState:
    """The state of a unit; the same one each time."""
    return cast(FSDPState, _state_of(runner))


def _state_of(runner: Runner) -> FSDPState | None:
    states = runner.modules()[0].__dict__.get(STATE_KEY, {})
    return cast(FSDPState | None, states.get(_function()))  # None: FullyShardedDataParallel's


def register(modules: list[nn.Module], runner: Runner) -> None:
    """Makes ``torch.distributed.fsdp.fully_shard.state`` answer for ``modules``, and refuse them a
    second time."""
    state = FSDPState(runner)
    for module in modules:
        module.__dict__.setdefault(STATE_KEY, {})[_function()] = state
        module.__dict__.setdefault(REGISTRY_KEY, {})["fully_shard"] = RegistryItem()


def _function() -> Callable[..., Any]:
    """What torch's registry has ``fully_shard`` by: the function inside of its decorator."""
    return cast(Callable[..., Any], _torchs_fully_shard.__wrapped__)  # type: ignore[attr-defined]


def refuse_torchs(ours: type) -> None:
    """Makes torch's wrappers around a module of the class ``ours`` an error at once, by what each
    of them does to every module inside before it shards anything: its ``fully_shard`` and
    ``replicate`` read the registry, its ``FullyShardedDataParallel`` leaves a mark."""

    def registry(self: nn.Module) -> Any:
        asks = sys._getframe(1).f_back  # others ask for other reasons, for state dicts say
        if asks is not None and asks.f_code.co_name == "_is_composable_with_fsdp":
            raise _shards_shards(self, "fully_shard")
        return self.__dict__.get(REGISTRY_KEY)

    def mark(self: nn.Module, _: bool) -> None:
        raise _shards_shards(self, "FullyShardedDataParallel")

    setattr(ours, REGISTRY_KEY, property(registry))
    setattr(ours, "_fsdp_use_orig_params", property(fset=mark))  # noqa: B010


def _shards_shards(module: nn.Module, face: str) -> ValueError:
    return ValueError(
        f"{at(module)}torch's {face} is applied to a module around it, and can't shard its "
        "shards: apply torch_hsdp_ckpt's to that module too"
    )
