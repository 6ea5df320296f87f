"""What the ranks can't plan alone: gathered, planned by DCP on the coordinator, scattered."""

import dataclasses
import math
import pickle
from collections.abc import Callable, Sequence

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ...common.agreement import Agreement
from ...errors import CheckpointError
from .local_state import LocalState
from .static_plan import is_one_ranks

_SHOWN = 20  # keys in one error message


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
        gathered_plans: list[SavePlan] = [pickle.loads(each) for each in gathered]
        _check_agreement(gathered_plans)
        gathered_plans = _keep_together(gathered_plans)
        final, entries = plan_by_dcp(gathered_plans, flatten=local.paths is not None)
        plans.extend(pickle.dumps(plan) for plan in final)
        return b""

    agreement.verdict(step, plan_all)
    plan: SavePlan = pickle.loads(agreement.scatter(step, plans))
    return GatheredPlan(plan.items, entries)


def _pickled_plan(local: LocalState, names: Sequence[str]) -> bytes:
    plan = SavePlan(local.items_of(names), planner_data=local.paths_of(names))
    return pickle.dumps(plan)


def _check_agreement(plans: Sequence[SavePlan]) -> None:
    """CheckpointError for a key under which ranks hold tensors of different shapes or dtypes, or
    tensors and objects: the metadata has room for one, the others would be lost."""
    ranks: dict[str, dict[str, list[int]]] = {}  # by name and what is there
    for rank, plan in enumerate(plans):
        for name, kind in {item.index.fqn: _kind_of(item) for item in plan.items}.items():
            ranks.setdefault(name, {}).setdefault(kind, []).append(rank)
    problems = [
        f"{name}: " + ", ".join(f"{kind} on ranks {held}" for kind, held in kinds.items())
        for name, kinds in ranks.items()
        if len(kinds) > 1
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more keys" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            "ranks hold different things under one key, of which a checkpoint can keep one; give "
            f"each rank keys of its own: {'; '.join(problems[:_SHOWN])}{more}"
        )


def _kind_of(item: WriteItem) -> str:
    if item.tensor_data is None:
        return "an object"
    dtype = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    what = "a tensor" if item.type == WriteItemType.TENSOR else "a sharded tensor"
    return f"{what} {list(item.tensor_data.size)} of {dtype}"


def _keep_together(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leaves objects, and the small plain tensors that belong to them, to the first rank that has
    them."""
    seen = set[str]()
    kept: list[SavePlan] = []
    for plan in plans:
        items = [item for item in plan.items if item.index.fqn not in seen]
        seen.update(item.index.fqn for item in items if _is_one_ranks(item))
        kept.append(dataclasses.replace(plan, items=items))
    return kept


def _is_one_ranks(item: WriteItem) -> bool:
    if item.type == WriteItemType.BYTE_IO:
        return True
    data = item.tensor_data
    if item.type != WriteItemType.TENSOR or data is None:
        return False
    return is_one_ranks(math.prod(data.size) * data.properties.dtype.itemsize)


def plan_by_dcp(plans: Sequence[SavePlan], flatten: bool) -> tuple[list[SavePlan], Metadata]:
    """DCP's own planning: every rank's final plan, and its entries of the metadata."""
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    planner.set_up_planner({}, is_coordinator=True)
    final, metadata = planner.create_global_plan(list(plans))
    return final, metadata
