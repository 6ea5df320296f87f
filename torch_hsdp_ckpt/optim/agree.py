"""Whether all ranks of a mesh have come with the same tensors, found out before any of them waits
for another one's data."""

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..common.agreement import Agreement, agreement_of, groups_of

_SAME, _DIFFERENT, _REFUSED = b"=", b"/", b"!"  # how what a rank says begins


def check_same_on_all_ranks(
    mesh: DeviceMesh, digest: bytes, names: Callable[[], Sequence[str]], problem: str = ""
) -> None:
    """Returns on all ranks of ``mesh`` if all have passed the same ``digest`` and no ``problem``,
    and raises the same error on all of them if not. Collective over the mesh.

    ``problem``: what is wrong with this rank's tensors, which becomes a ValueError. ``names``: what
    the digest stands for, for the RuntimeError that says what some ranks have and others lack.

    It goes from host to host, over Gloo groups of its own: one small all-gather where the mesh
    holds all ranks, and no device is waited for."""
    said = _REFUSED + problem.encode() if problem else _SAME + digest
    for group in groups_of(mesh):
        # Under torch's "fake" backend the other ranks do not exist.
        if dist.get_world_size(group) > 1 and str(dist.get_backend(group)) != "fake":
            agreement = agreement_of(group, "whole tensors")
            said = _agreed(agreement, dist.get_process_group_ranks(group), said, names)
    if said.startswith(_REFUSED):
        raise ValueError(said[1:].decode())
    if said.startswith(_DIFFERENT):
        raise RuntimeError(said[1:].decode())


def _agreed(
    agreement: Agreement, ranks: Sequence[int], said: bytes, names: Callable[[], Sequence[str]]
) -> bytes:
    """What the ranks of a group say together: the same on all of them."""
    answers = agreement.exchange("compare", said)
    failed = [answer for answer in answers if not answer.startswith(_SAME)]
    if failed:
        return failed[0]
    if len(set(answers)) == 1:
        return said
    listed = agreement.exchange("explain", "\n".join(names()).encode())
    by_rank = [answer.decode().split("\n") for answer in listed]
    return _DIFFERENT + _difference(ranks, by_rank).encode()


def _difference(ranks: Sequence[int], by_rank: Sequence[Sequence[str]]) -> str:
    for name in dict.fromkeys(name for names in by_rank for name in names if name):
        having = [rank for rank, names in zip(ranks, by_rank, strict=True) if name in names]
        lacking = sorted(set(ranks) - set(having))
        if lacking:
            return (
                f"{name} is there on rank {having[0]} and not on rank {lacking[0]}: all ranks have "
                "to come with the same ones, so leave out the step on all ranks or on none"
            )
    return (
        f"ranks {ranks[0]} to {ranks[-1]} have the same tensors and different orders, costs or "
        "sizes of rounds"
    )
