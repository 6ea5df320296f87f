"""Every wait, and whatever else keeps the streams of a device in order, is needed
(docs/design/schedule.md): without it one of the programs in orderings.py is wrong, which the
simulated GPU finds."""

import re
from pathlib import Path

import orderings
import pytest
from ranks import SIMULATED, RankError, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not SIMULATED, reason="only a simulated GPU finds races"),
]

RACE = "simgpu: race"
# The ordering that is left out, the program which shows that, and what is found.
NEEDED = {
    "enter Gather::Send": (orderings.steps, RACE),
    "enter StreamReduction::Scatter": (orderings.steps, RACE),
    "enter GradReducer::RunPasses": (orderings.on_gloo, RACE),
    "within Gather::Send": (orderings.overlap, "assert"),
    "within StreamReduction::Scatter": (orderings.overlap, "assert"),
    "within StreamReduction::StartAllReduces": (orderings.on_gloo, RACE),
    "within StreamReduction::TakeWorks": (orderings.on_gloo, RACE),
    "within GradReducer::RunPasses": (orderings.casts, RACE),
    "within ForEachTable": (orderings.another_device, RACE),
    "join Gather::Join": (orderings.steps, RACE),
    "join Reduction::ReleaseInputs": (orderings.steps, RACE),
    "join GradReducer::Join": (orderings.steps, RACE),
    "uses Gather::Join": (orderings.gathered_elsewhere, RACE),
    "uses Reduction::ReleaseInputs": (orderings.backwards_elsewhere, RACE),
    "uses GradReducer::FreeShards": (orderings.gradients_elsewhere, RACE),
    "uses GradReducer::RunPasses": (orderings.casts, RACE),
    "uses GradReducer::PassesOf": (orderings.dropped_gradients, RACE),
    "uses ForEachTable": (orderings.many_pieces, "simgpu: host too early"),
    "hold StreamReduction::StartAllReduces": (orderings.steps, RACE),
    "enter HookReduction::Reduce": (orderings.comm_hook, RACE),
    "within HookReduction::Reduce": (orderings.comm_hook, "assert"),
    "hold HookReduction::Reduce": (orderings.comm_hook, RACE),
    "enter GradReducer::WriteToHost": (orderings.offloaded, RACE),
    "within GradReducer::WriteToHost": (orderings.offloaded, RACE),
    "join ParamGroup::AwaitReads": (orderings.offloaded, "simgpu: host too early"),
}


def _run(program, left_out: str) -> list[str]:
    backend = "cpu:gloo,cuda:gloo" if program is orderings.on_gloo else "cpu:gloo,cuda:nccl"
    arguments = (orderings.PROGRAMS.index(program), left_out)
    return run_ranks(orderings.run, 4, *arguments, backend=backend)[0]


@pytest.mark.parametrize("name", NEEDED)
def test_without_it_something_is_wrong(name: str) -> None:
    program, found = NEEDED[name]
    with pytest.raises(RankError, match=found):
        _run(program, name)


def test_the_table_has_all_of_them() -> None:
    seen = {name for program in orderings.PROGRAMS for name in _run(program, "none of them")}
    assert seen == set(NEEDED)
    page = (Path(__file__).parents[1] / "docs" / "design" / "schedule.md").read_text()
    rows = re.findall(r"^\| `((?:enter|within|join|uses|hold) [\w:]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(NEEDED)


@pytest.mark.parametrize("use", [orderings.full_parameter_elsewhere, orderings.shard_elsewhere])
def test_record_stream_of_a_parameter_is_honoured(use) -> None:
    """Their memory is a piece of a larger block, which the allocator alone would not find."""
    run_ranks(use, 4, True, backend="cpu:gloo,cuda:nccl")
    with pytest.raises(RankError, match=RACE):
        run_ranks(use, 4, False, backend="cpu:gloo,cuda:nccl")
