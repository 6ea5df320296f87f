"""``save``: a checkpoint planned without talking, written by all replicas, committed by one
rename.

The phases are values, each made from the one before: ``Opened`` (open.py), ``Planned`` (plan.py),
``Staged`` (stage.py), ``Written`` (write.py), and the checkpoint (commit.py). Ranks talk in the
first and in the last one only."""

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as torchs_save
from torch.distributed.checkpoint.storage import StorageWriter

from ...common.default_device import without_default_device
from ...common.rank_failure import own_error_of, raise_of_dcp
from ..positional import storage_by_position
from ..stateful import values_of
from ..storage.writer import FileSystemWriter
from .commit import write_and_commit
from .open import PreparedState, open_save, prepare_state, request_of
from .plan import plan
from .stage import stage_nothing
from .through_dcp import choose_writer, default_planner, say_once, why_dcp_plans
from .write import write


@storage_by_position("storage_writer")
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    trust_objects: bool = False,
) -> Metadata:
    """Saves a distributed state dict, as ``torch.distributed.checkpoint.save`` does, in its format.

    Called by all ranks of ``process_group``. Returns when the checkpoint is complete and durable,
    or raises on every rank and leaves an older checkpoint as it was. The R replicas of a shard that
    are in the group write 1/R of it each.

    Every rank plans its own part from meshes, placements and shapes. The ranks compare two digests
    and vote once. Where they hold different keys, or DTensors on meshes of their own (pipeline
    stages, experts), they also tell each other the names of their plain values, and the coordinator
    what they have planned. Tensor types that only DCP knows are gathered, planned by it and
    scattered. DCP plans everything where the planner is
    not exactly ``DefaultSavePlanner`` or has ``dedup_save_to_lowest_rank``, where the writer is not
    exactly :class:`FileSystemWriter` or writes through torch (extensions, other serialization
    formats), and without ``use_collectives``. A directory is written by :class:`FileSystemWriter`
    all the same.

    Args:
        state_dict: nested dicts and lists of tensors, DTensors, ``Stateful`` objects, plain values.
            Tensors are on the CPU or on an accelerator's devices. A plain tensor or value under the
            same name on all ranks is saved once.
        checkpoint_id: the directory, also as a ``file://`` address.
        storage_writer: a :class:`FileSystemWriter` with other options than the default ones, or
            another storage.
        planner: None for the default one.
        process_group: None for the default one. It must hold every shard; one shard group does.
        no_dist: save this process's state alone.
        use_collectives: False saves without coordination, as in DCP: every rank has a metadata of
            its own.
        trust_objects: False refuses objects that ``load`` would refuse (``docs/supported.md`` has
            the kinds that it takes); True saves them, with a warning, for a ``load`` with
            ``trust_objects=True``. What DCP plans is saved with a warning in any case.

    Returns:
        The ``Metadata``, decoded when it is looked at; its ``result`` is a :class:`SaveResult`.

    Raises (on all ranks, naming the rank):
        OSError: a system call failed; ``errno`` and ``filename`` are set.
        CheckpointError: anything else: ``overwrite=False`` and there is a checkpoint, another save
            has taken the directory over, a shard that no rank of the group holds, different things
            under one key (a plain value and a sharded tensor, or two shapes, dtypes or meshes; of
            plain values that differ in nothing else one rank's is saved), a rank that died
            or did not answer within the group's timeout, an object that could not be loaded, an
            exception of any other class on one of the ranks, an address (``s3://``) for a
            directory.

    Both are ``CheckpointException``s of DCP too, and name their ``failures`` by rank.
    """
    chosen = choose_writer(storage_writer, checkpoint_id)
    writer = chosen.writer
    if reason := why_dcp_plans(writer, planner, use_collectives):
        if chosen.refused is not None:
            raise chosen.refused
        say_once(f"DCP plans this save: {reason}")
        try:
            with without_default_device():
                metadata: Metadata = torchs_save(
                    state_dict,
                    checkpoint_id=checkpoint_id,
                    storage_writer=writer,
                    planner=planner,
                    process_group=process_group,
                    no_dist=no_dist,
                    use_collectives=use_collectives,
                )
        except CheckpointException as error:
            raise_of_dcp("save", error)
        return metadata
    assert isinstance(writer, FileSystemWriter)
    values, failure = values_of(state_dict)
    failure = chosen.refused or failure
    request = request_of(writer, process_group, "save", no_dist, trust_objects)

    def prepare() -> PreparedState:
        if failure is not None:
            raise failure
        return prepare_state(request, values, default_planner(planner))

    with without_default_device():
        with own_error_of(chosen.refused):
            opened = open_save(request, prepare)
        return write_and_commit(opened, lambda: write(stage_nothing(plan(opened))))
