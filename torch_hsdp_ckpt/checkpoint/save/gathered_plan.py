"""What the ranks can't plan alone: gathered, planned by DCP on the coordinator, scattered."""

import dataclasses
import pickle
from collections.abc import Callable, Sequence

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ...common.agreement import Agreement
from .local_state import LocalState


@dataclasses.dataclass(frozen=True)
class GatheredPlan:
    """``items``: what this rank writes of it. ``metadata``: its entries, on the coordinator."""

    items: Sequence[WriteItem] = ()
    metadata: Metadata = dataclasses.field(default_factory=lambda: Metadata({}))


def gather_plan(
    agreement: Agreement, local: LocalState, names: Callable[[], Sequence[str]]
) -> GatheredPlan:
    """Plans this rank's values of these names; called by all ranks, with names of their own.

    ``names`` is called where what it raises reaches all ranks."""
    step = "plan"
    own, _ = agreement.run_and_tell(step, lambda: _pickled_plan(local, names()), lambda own: b"")
    gathered = agreement.gather(step, own)
    plans: list[bytes] = []
    entries = Metadata({})

    def plan_all() -> bytes:
        nonlocal entries
        gathered_plans = [pickle.loads(each) for each in gathered]
        final, entries = plan_by_dcp(gathered_plans, flatten=local.paths is not None)
        plans.extend(pickle.dumps(plan) for plan in final)
        return b""

    agreement.verdict(step, plan_all)
    plan: SavePlan = pickle.loads(agreement.scatter(step, plans))
    return GatheredPlan(plan.items, entries)


def _pickled_plan(local: LocalState, names: Sequence[str]) -> bytes:
    plan = SavePlan(local.items_of(names), planner_data=local.paths_of(names))
    return pickle.dumps(plan)


def plan_by_dcp(plans: Sequence[SavePlan], flatten: bool) -> tuple[list[SavePlan], Metadata]:
    """DCP's own planning: every rank's final plan, and its entries of the metadata."""
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    planner.set_up_planner({}, is_coordinator=True)
    final, metadata = planner.create_global_plan(list(plans))
    return final, metadata
