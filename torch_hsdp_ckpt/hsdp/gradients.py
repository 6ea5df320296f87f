"""How a unit's reduced gradients get into ``parameter.grad``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from .. import _C
from ..common.tensors import dtensor_around


class TrainableParameter(NamedTuple):
    """A sharded parameter that gets a gradient. ``grad_spec``: the gradient's, whose dtype may
    differ from the parameter's."""

    name: str
    parameter: nn.Parameter
    grad_spec: DTensorSpec


class UnitGradients:
    """Takes over what a unit's reduction has left, for the trainable parameters of the unit, in
    their order.

    It keeps the DTensors that it has handed out: building one costs tens of microseconds, and after
    ``zero_grad`` the last step's can be filled again, if nobody else holds them. Their memory goes
    back at the next forward (:meth:`free_unheld`)."""

    def __init__(self, core: _C.Unit, trainable: Sequence[TrainableParameter]) -> None:
        self._core = core
        self._trainable = trainable
        self._parameters = [each.parameter for each in trainable]
        self._keep([])

    def _keep(self, gradients: list[DTensor]) -> None:
        self._kept = gradients
        self._kept_locals = [gradient._local_tensor for gradient in gradients]
        self._kept_are_freed = False
        # Equal counts mean that nobody has come since they were made.
        self._holders_of_kept = self._count_holders()

    def forget_kept(self) -> None:
        """Lets go of the DTensors of the last step."""
        self._keep([])

    def free_unheld(self) -> None:
        """Gives back the memory of the last step's gradients, if ``zero_grad`` has set them to None
        and nobody else holds them: what forward keeps for backward can have it."""
        if not self._kept_are_freed and self._kept_are_unheld():
            self._core.free_grads(self._kept_locals)
            self._kept_are_freed = True

    def take(self) -> None:
        """The reduction is over: adds it into the parameters' gradients, or makes it theirs."""
        unused = set(self._core.unused())
        if unused or _C.have_gradients(self._parameters):
            self._add(unused)
        else:
            self._assign_all()
        self._run_hooks(unused)

    def _assign_all(self) -> None:
        if not self._kept_are_unheld():
            self._keep(self._new_gradients())
        self._core.write_grads(self._kept_locals, [False] * len(self._kept))
        self._kept_are_freed = False
        _C.set_gradients(self._parameters, self._kept)

    def _add(self, unused: set[int]) -> None:
        """Adds to the gradients that are there and makes those that are missing, except for the
        ``unused`` parameters, which no rank's backward has reached."""
        gradients = [parameter.grad for parameter in self._parameters]
        used = [i for i in range(len(gradients)) if i not in unused]
        missing = [i for i in used if gradients[i] is None]
        # The kept ones are not filled: a parameter that has a gradient may be using one of them.
        new_locals = self._core.empty_grads() if missing else []
        targets: list[torch.Tensor | None] = [None] * len(gradients)
        for i in used:
            gradient = gradients[i]
            targets[i] = new_locals[i] if gradient is None else self._local_of(i, gradient)
        self._core.write_grads(targets, [gradient is not None for gradient in gradients])
        for i in missing:
            trainable = self._trainable[i]
            trainable.parameter.grad = dtensor_around(new_locals[i], trainable.grad_spec)

    def _local_of(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        if isinstance(gradient, DTensor):
            return gradient._local_tensor
        raise ValueError(
            f"the gradient of {self._trainable[index].name} is a {type(gradient).__name__}, not "
            "the DTensor that backward left there: set it to None before the next backward, or "
            "change the DTensor's local tensor"
        )

    def _run_hooks(self, unused: set[int]) -> None:
        """Runs what waits for a gradient: what ``register_post_accumulate_grad_hook`` has
        registered, and the optimizers that torch's ``_apply_optimizer_in_backward`` has made, whose
        own hooks are on an autograd node that no gradient comes to here."""
        for i, parameter in enumerate(self._parameters):
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
            optimizers = getattr(parameter, "_in_backward_optimizers", ())
            if i in unused or not (hooks or optimizers):
                continue
            self._core.join_grads()  # the hook reads on this stream
            for hook in list(hooks.values()) if hooks else ():
                hook(parameter)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def _new_gradients(self) -> list[DTensor]:
        pairs = zip(self._core.empty_grads(), self._trainable, strict=True)
        return [dtensor_around(local, trainable.grad_spec) for local, trainable in pairs]

    def _kept_are_unheld(self) -> bool:
        """Whether nobody else holds one of them: as a Python object, as a tensor, or by a view of
        its memory."""
        return bool(self._kept) and self._count_holders() == self._holders_of_kept

    def _count_holders(self) -> list[int]:
        return _C.count_holders(self._kept) + _C.count_holders(self._kept_locals)
