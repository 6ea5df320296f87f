"""What the ranks can't plan alone: gathered, planned by DCP on the coordinator, scattered."""

import dataclasses
import pickle
from collections.abc import Callable, Sequence

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ...common.agreement import Agreement
from .division import Held, Kind, add_held, refuse_contradictions
from .local_state import LocalState


@dataclasses.dataclass(frozen=True)
class GatheredPlan:
    """``items``: what this rank writes of it. ``held`` and ``metadata``: what ranks hold of it, and
    its entries, on the coordinator."""

    items: Sequence[WriteItem] = ()
    held: Held = dataclasses.field(default_factory=dict)
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
    held: Held = {}
    entries = Metadata({})

    def plan_all() -> bytes:
        nonlocal entries
        gathered_plans: list[SavePlan] = [pickle.loads(each) for each in gathered]
        held.update(_held(gathered_plans))
        refuse_contradictions(held)
        final, entries = plan_by_dcp(gathered_plans, flatten=local.paths is not None)
        plans.extend(pickle.dumps(plan) for plan in final)
        return b""

    agreement.verdict(step, plan_all)
    plan: SavePlan = pickle.loads(agreement.scatter(step, plans))
    return GatheredPlan(plan.items, held, entries)


def _pickled_plan(local: LocalState, names: Sequence[str]) -> bytes:
    plan = SavePlan(local.items_of(names), planner_data=local.paths_of(names))
    return pickle.dumps(plan)


def _held(plans: Sequence[SavePlan]) -> Held:
    held: Held = {}
    for rank, plan in enumerate(plans):
        for name, kind in {item.index.fqn: _kind_of(item) for item in plan.items}.items():
            add_held(held, name, kind, [rank])
    return held


def _kind_of(item: WriteItem) -> Kind:
    if item.tensor_data is None:
        return Kind("an object")
    dtype = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    what = "a tensor" if item.type == WriteItemType.TENSOR else "a sharded tensor"
    return Kind(f"{what} {list(item.tensor_data.size)} of {dtype}")


def plan_by_dcp(plans: Sequence[SavePlan], flatten: bool) -> tuple[list[SavePlan], Metadata]:
    """DCP's own planning: every rank's final plan, and its entries of the metadata."""
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    planner.set_up_planner({}, is_coordinator=True)
    final, metadata = planner.create_global_plan(list(plans))
    return final, metadata
