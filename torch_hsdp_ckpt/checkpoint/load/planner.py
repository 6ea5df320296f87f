"""Planning a load as DCP does: with a planner of any class, which may have its say on every rank
and on the coordinator."""

import pickle
from typing import Any, NamedTuple

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from ..storage.reader import FileSystemReader
from .open import Opened


def plan_with_planner(state_dict: dict[str, Any], opened: Opened, planner: LoadPlanner) -> LoadPlan:
    """This rank's plan, to be finished by the planner: local plans, a global one on the
    coordinator. Called by all ranks.

    The plans travel to the coordinator only if some rank's planner or reader makes a global plan
    other than DCP's own, which leaves them as they are."""
    agreement = opened.ranks.agreement
    local, told = agreement.run_and_tell(
        "plan",
        lambda: _plan_locally(state_dict, opened, planner),
        lambda local: _GLOBAL if local.needs_global_plan else b"",
    )
    if _GLOBAL not in told:
        return local.plan
    plans = agreement.gather("plan", pickle.dumps(local.plan))
    final_plans: list[bytes] = []

    def plan_globally() -> bytes:
        made = planner.create_global_plan([pickle.loads(plan) for plan in plans])
        finished = opened.reader.prepare_global_plan(made)
        final_plans.extend(pickle.dumps(plan) for plan in finished)
        return b""

    agreement.verdict("plan", plan_globally)
    own_plan: LoadPlan = pickle.loads(agreement.scatter("plan", final_plans))
    return own_plan


_GLOBAL = b"global"


class _LocalPlan(NamedTuple):
    plan: LoadPlan
    needs_global_plan: bool


def _plan_locally(state_dict: dict[str, Any], opened: Opened, planner: LoadPlanner) -> _LocalPlan:
    reader, agreement = opened.reader, opened.ranks.agreement
    is_coordinator = agreement.is_coordinator
    metadata = reader.use_metadata_file(opened.metadata)
    planner.set_up_planner(state_dict, metadata, is_coordinator)
    reader.set_up_storage_reader(
        metadata, is_coordinator, rank=agreement.rank, use_collectives=True
    )
    plan = reader.prepare_local_plan(planner.create_local_plan())
    stock_planning = DefaultLoadPlanner.create_global_plan
    is_stock = getattr(type(planner), "create_global_plan", None) is stock_planning
    is_stock_reader = type(reader).prepare_global_plan is FileSystemReader.prepare_global_plan
    return _LocalPlan(plan, needs_global_plan=not (is_stock and is_stock_reader))
