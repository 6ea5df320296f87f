"""Planning a load as DCP does: with a planner of any class, which may have its say on every rank
and on the coordinator."""

import pickle
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from ...common.agreement import Agreement
from ..storage.reader import FileSystemReader


def plan_with_planner(
    state_dict: dict[str, Any],
    reader: FileSystemReader,
    planner: LoadPlanner,
    agreement: Agreement,
    file: bytes,
) -> LoadPlan:
    """This rank's plan, to be finished by the planner: local plans, a global one on the
    coordinator. Called by all ranks. ``file``: the bytes of `.metadata`.

    The plans travel to the coordinator only if some rank's planner or reader makes a global plan
    other than DCP's own, which leaves them as they are."""
    local_plan = LoadPlan([])

    def local() -> bytes:
        nonlocal local_plan
        metadata = reader.use_metadata_file(file)
        planner.set_up_planner(state_dict, metadata, agreement.is_coordinator)
        reader.set_up_storage_reader(
            metadata, agreement.is_coordinator, rank=agreement.rank, use_collectives=True
        )
        local_plan = reader.prepare_local_plan(planner.create_local_plan())
        stock = (
            getattr(type(planner), "create_global_plan", None)
            is DefaultLoadPlanner.create_global_plan
            and type(reader).prepare_global_plan is FileSystemReader.prepare_global_plan
        )
        return b"" if stock else b"global"

    if b"global" not in agreement.run("plan", local):
        return local_plan
    plans = agreement.gather("plan", pickle.dumps(local_plan))
    everybodys: list[bytes] = []

    def whole() -> bytes:
        made = planner.create_global_plan([pickle.loads(each) for each in plans])
        everybodys.extend(pickle.dumps(each) for each in reader.prepare_global_plan(made))
        return b""

    agreement.verdict("plan", whole)
    mine: LoadPlan = pickle.loads(agreement.scatter("plan", everybodys))
    return mine
