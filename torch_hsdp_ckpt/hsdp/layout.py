"""How a parameter lies on its mesh: sharded between steps, full while its unit computes.

Placements are those of the installed torch's ``fully_shard`` (``_fsdp_param.py``)."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .. import _C
from ..common.tensors import dtensor_around, local_of
from .data_parallel import DataParallel

# What cuts a tensor's dimension. (A _StridedShard is no Shard in torch 2.15.)
_CUTS = (Shard, _StridedShard)


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """``sharded``: of the DTensor that the module shows between steps. ``full``: of the one that it
    computes with; None: that is a plain tensor. ``dim``: which dimension of this rank's part of the
    full parameter the unit's shard group cuts. ``data_parallel_dims``: of ``full``'s mesh, along
    which the unit reduces gradients."""

    sharded: DTensorSpec
    full: DTensorSpec | None
    dim: int
    data_parallel_dims: frozenset[int] = frozenset()

    def with_dtype(self, dtype: torch.dtype) -> "ParameterLayout":
        """The same of a parameter whose shards have ``dtype``."""
        return dataclasses.replace(self, sharded=spec_with_dtype(self.sharded, dtype))

    @property
    def may_sum_elsewhere(self) -> bool:
        """Whether a gradient may be a summand over mesh dimensions that the unit does not know of:
        those along which the full parameter is replicated."""
        return self.full is not None and any(
            isinstance(placement, Replicate)
            for dim, placement in enumerate(self.full.placements)
            if dim not in self.data_parallel_dims
        )

    def stored(
        self, full: torch.Tensor, param_dtype: torch.dtype | None, is_extended: bool
    ) -> _C.StoredParam:
        """``full``: a parameter that lies as this says, before it is sharded. ``param_dtype``: it
        computes in; None: its own. ``is_extended``: its own class gathers it."""
        local = local_of(full)
        return _C.StoredParam(
            sizes=list(local.shape),
            dim=self.dim,
            dtype=local.dtype,
            param_dtype=param_dtype,
            is_summed_elsewhere=self.may_sum_elsewhere,
            is_dtensor=self.full is not None,
            is_extended=is_extended,
        )

    def full_around(self, local: torch.Tensor) -> torch.Tensor:
        """The full parameter whose part on this rank is ``local``."""
        if self.full is None:
            return local
        return dtensor_around(local, spec_with_dtype(self.full, local.dtype))

    def full_from(self, whole: torch.Tensor) -> torch.Tensor:
        """The full parameter, of which every rank has the ``whole`` on all mesh dimensions: a
        view."""
        return whole if self.full is None else self.full_around(own_box(whole, self.full))

    def local_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's part of the full gradient, placed as the full parameter; but a sum over the
        unit's own mesh dimensions is left to the unit. Collective over the others, if they have
        summands."""
        assert self.full is not None and isinstance(gradient, DTensor)
        spec = gradient._spec
        if spec.placements != self.full.placements:  # mostly they are
            gradient = self._placed_as_full(gradient)
        local = gradient._local_tensor
        wait = getattr(local, "wait", None)  # torch's AsyncCollectiveTensor
        return local if wait is None else wait()

    def _placed_as_full(self, gradient: DTensor) -> DTensor:
        assert self.full is not None
        wanted = [
            gradient.placements[dim] if dim in self.data_parallel_dims else placement
            for dim, placement in enumerate(self.full.placements)
        ]
        if gradient.placements == tuple(wanted):
            return gradient
        with torch.no_grad():
            return gradient.redistribute(placements=wanted)


def own_box(whole: torch.Tensor, spec: DTensorSpec) -> torch.Tensor:
    """This rank's part of ``whole``, a view."""
    shape, offset = compute_local_shape_and_global_offset(whole.shape, spec.mesh, spec.placements)
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, start if size else 0, size)
    return whole


def spec_with_dtype(spec: DTensorSpec, dtype: torch.dtype) -> DTensorSpec:
    meta = spec.tensor_meta
    assert meta is not None
    if meta.dtype == dtype:
        return spec
    return DTensorSpec(
        spec.mesh, spec.placements, tensor_meta=TensorMeta(meta.shape, meta.stride, dtype)
    )


def layout_of(parameter: torch.Tensor, data_parallel: DataParallel, dim: int) -> ParameterLayout:
    """``dim``: of the parameter, which the shards cut, from the end if negative.

    Raises ValueError, without naming the parameter, for a dimension, mesh or placement that does
    not go with ``data_parallel``."""
    dim = _checked_dim(local_of(parameter).shape, data_parallel.mesh, dim)
    if isinstance(parameter, DTensor):
        if data_parallel.whole is None:
            return _beside_the_mesh(parameter._spec, data_parallel.mesh, dim)
        return _within_the_mesh(parameter._spec, data_parallel, dim)
    if data_parallel.whole is not None:
        raise ValueError(
            "is a plain tensor, and with dp_mesh_dims every parameter has to be a DTensor on the "
            f"whole mesh (distribute_module makes it one); {data_parallel.whole}"
        )
    shape, dtype = parameter.shape, parameter.dtype
    stride = torch.empty(shape, device="meta").stride()
    placements = _over_data_parallel(data_parallel.mesh, _shard(dim, 1) if shape else Replicate())
    meta = TensorMeta(shape, stride, dtype)
    spec = DTensorSpec(data_parallel.mesh, placements, tensor_meta=meta)
    return ParameterLayout(spec, None, dim)


def _checked_dim(local: torch.Size, mesh: DeviceMesh, dim: int) -> int:
    if not local and dim == 0:
        return 0
    if not -len(local) <= dim < len(local):
        raise ValueError(f"has no dimension {dim} to be sharded on")
    dim %= len(local)
    shards = mesh.size(mesh.ndim - 1)
    if dim > 0 and local[dim] % shards:
        raise ValueError(
            f"is to be placed as {Shard(dim)}, and its dimension {dim} of {local[dim]} (of shape "
            f"{tuple(local)} on this rank) does not divide evenly among {shards} shards, as all "
            f"but the first have to; {mesh}"
        )
    return dim


def share_meshes(layouts: Sequence[ParameterLayout]) -> list[ParameterLayout]:
    """The same with one mesh object for all equal ones: what is kept by mesh is kept once."""
    meshes: dict[DeviceMesh, DeviceMesh] = {}
    shared = []
    for layout in layouts:
        spec = layout.sharded
        mesh = meshes.setdefault(spec.mesh, spec.mesh)
        if mesh is not spec.mesh:
            spec = DTensorSpec(mesh, spec.placements, tensor_meta=spec.tensor_meta)
        shared.append(dataclasses.replace(layout, sharded=spec))
    return shared


def _over_data_parallel(mesh: DeviceMesh, shards: Placement) -> tuple[Placement, ...]:
    return (*(Replicate(),) * (mesh.ndim - 1), shards)


def _shard(dim: int, pieces: int) -> Placement:
    """The placement of shards that are cut from each of ``pieces`` into which mesh dimensions
    further to the right have cut a dimension."""
    return _StridedShard(dim, split_factor=pieces) if pieces > 1 else Shard(dim)


def _pieces(spec: DTensorSpec, dim: int, mesh_dims: Sequence[int]) -> int:
    """Into how many pieces ``mesh_dims`` cut dimension ``dim``."""
    return math.prod(
        spec.mesh.size(mesh_dim)
        for mesh_dim in mesh_dims
        if isinstance(placement := spec.placements[mesh_dim], _CUTS) and placement.dim == dim
    )


def _check_placements(
    spec: DTensorSpec, mesh_dims: Sequence[int], allowed: tuple[type[Placement], ...]
) -> None:
    for mesh_dim in mesh_dims:
        if not isinstance(spec.placements[mesh_dim], allowed):
            public = [each.__name__ for each in allowed if each is not _StridedShard]
            raise ValueError(
                f"is placed {spec.placements} on {spec.mesh}, and on dimension {mesh_dim} of that "
                f"mesh it has to be {' or '.join(public)}"
            )


def _beside_the_mesh(full: DTensorSpec, mesh: DeviceMesh, dim: int) -> ParameterLayout:
    """``full`` knows other dimensions of the root mesh than ``mesh``: those of tensor or expert
    parallelism."""
    others = range(full.mesh.ndim)
    _check_placements(full, others, (Replicate, *_CUTS))
    try:
        whole = DeviceMesh._concatenate([mesh, full.mesh])
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"is a DTensor on {full.mesh}, placed {full.placements}, and can only be sharded over "
            f"other dimensions of the same root mesh, which {mesh} is not ({error}). If it has "
            "been sharded before, wrap it once"
        ) from error
    shards = _shard(dim, _pieces(full, dim, others)) if full.shape else Replicate()
    placements = (*_over_data_parallel(mesh, shards), *full.placements)
    spec = DTensorSpec(whole, placements, tensor_meta=full.tensor_meta)
    return ParameterLayout(spec, full, dim)


def _within_the_mesh(full: DTensorSpec, data_parallel: DataParallel, dim: int) -> ParameterLayout:
    """``full`` knows the whole mesh, the unit's dimensions among them."""
    if full.mesh != data_parallel.whole:
        raise ValueError(
            f"is a DTensor on {full.mesh}, and with dp_mesh_dims it has to be on the mesh that "
            f"fully_shard is given, {data_parallel.whole}"
        )
    shard_dims, replica_dims = data_parallel.shard_dims, data_parallel.replica_dims
    _check_placements(full, (*shard_dims, *replica_dims), (Replicate,))
    placements = list(full.placements)
    for mesh_dim in shard_dims if full.shape else ():
        right = range(mesh_dim + 1, full.mesh.ndim)
        placements[mesh_dim] = _shard(dim, _pieces(full, dim, right))
    spec = DTensorSpec(full.mesh, tuple(placements), tensor_meta=full.tensor_meta)
    if len(shard_dims) > 1:
        spec = _with_one_shard_dimension(spec, data_parallel)
    return ParameterLayout(spec, full, dim, frozenset((*shard_dims, *replica_dims)))


def _with_one_shard_dimension(spec: DTensorSpec, data_parallel: DataParallel) -> DTensorSpec:
    """``spec`` on a mesh on which the unit's dimensions stand together, the shards' flattened."""
    first, *other_shard_dims = data_parallel.shard_dims
    own = {*other_shard_dims, *data_parallel.replica_dims}
    names = spec.mesh.mesh_dim_names
    assert names is not None
    meshes: list[DeviceMesh] = []
    placements: list[Placement] = []
    for mesh_dim, placement in enumerate(spec.placements):
        if mesh_dim == first:
            meshes.append(data_parallel.mesh)
            placements += _over_data_parallel(data_parallel.mesh, placement)
        elif mesh_dim not in own:
            meshes.append(spec.mesh[names[mesh_dim]])
            placements.append(placement)
    return DTensorSpec(
        DeviceMesh._concatenate(meshes), tuple(placements), tensor_meta=spec.tensor_meta
    )
