"""The DTensors around a unit's shards, and which parameters can be sharded at all."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from .precision import REDUCIBLE_DTYPES
from .slots import RegisteredParameter

_SHARDED_AS = "_hsdp_ckpt_sharded_as"  # on an original parameter: its name in the unit that has it


def sharded_spec(mesh: DeviceMesh, shape: torch.Size, dtype: torch.dtype) -> DTensorSpec:
    """How a parameter of ``shape`` lies on ``mesh``: sharded on dim 0 over the mesh's last
    dimension, replicated on the others. Without dimensions it is replicated on all."""
    stride = torch.empty(shape, device="meta").stride()
    replicas = (Replicate(),) * (mesh.ndim - 1)
    shards = Shard(0) if shape else Replicate()
    meta = TensorMeta(shape, stride, dtype)
    return DTensorSpec(mesh, (*replicas, shards), tensor_meta=meta)


def dtensor_around(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """A DTensor with ``local`` itself inside, this rank's part.

    ``DTensor.from_local`` would put a view of it there, which can't be deep-copied or saved
    alone."""
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def mark_as_sharded(parameter: nn.Parameter, name: str) -> None:
    """Leaves a note on an original parameter, which another module may share."""
    setattr(parameter, _SHARDED_AS, name)


def check_can_be_sharded(registered: RegisteredParameter, device: torch.device) -> None:
    """Raises ValueError, with rank, module and parameter, for what no unit on ``device`` can
    hold."""
    parameter = registered.parameter
    problem = _why_not_shardable(parameter, device)
    if problem:
        module = type(registered.slots[0].module).__name__
        shape = tuple(parameter.shape)
        raise ValueError(
            f"rank {dist.get_rank()}: module {module}: parameter {registered.name} of shape "
            f"{shape} {problem}"
        )


def _why_not_shardable(parameter: nn.Parameter, device: torch.device) -> str:
    """What is wrong with ``parameter`` and what to do; an empty text if nothing is."""
    if isinstance(parameter, DTensor):
        return (
            "already is a DTensor: sharding it a second time (tensor parallelism) is not "
            "supported. Use torch's own fully_shard for this module, or leave the parameter out "
            "(ignored_states, ignored_params) and reduce its gradient yourself"
        )
    sharded_as = getattr(parameter, _SHARDED_AS, None)
    if sharded_as is not None:
        return (
            f"is shared with another wrapped module, which has sharded it as {sharded_as}: wrap "
            "one module that holds all uses, or leave both modules to the same unit"
        )
    if parameter.requires_grad and parameter.dtype not in REDUCIBLE_DTYPES:
        return (
            f"is {parameter.dtype}, whose gradients are not reduced here (float64, float32, "
            "bfloat16, float16 are): name it in ignored_states, or convert it"
        )
    if parameter.device != device and not parameter.is_meta:
        return (
            f"is on {parameter.device} and the mesh needs {device}: move the module first (or "
            "device_id)"
        )
    return ""


def check_same_placement(name: str, found: object, expected: DTensorSpec) -> DTensor:
    """Returns ``found``, which was put into a unit's slot, if it is a DTensor of ``expected``'s
    mesh, placements and shape; raises ValueError otherwise."""
    if not isinstance(found, DTensor):
        raise ValueError(
            f"parameter {name} was replaced by a {type(found).__name__}; expected a DTensor"
        )
    as_before = (
        found.device_mesh == expected.mesh
        and found.placements == expected.placements
        and found.shape == expected.shape
    )
    if not as_before:
        raise ValueError(
            f"parameter {name} was replaced by one of shape {tuple(found.shape)}, placed "
            f"{found.placements} on {found.device_mesh}; expected {tuple(expected.shape)}, "
            f"{expected.placements} on {expected.mesh}"
        )
    return found
