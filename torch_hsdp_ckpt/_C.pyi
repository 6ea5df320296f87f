import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import Buffer

class RecordPlace:
    """Where `.metadata` says that a record is: file relative to the directory, bytes."""

    fqn: str
    file: str
    offset: int
    length: int
    def __init__(
        self, fqn: str, file: str, offset: int, length: int, chunk: Sequence[int]
    ) -> None: ...

class BoxRead:
    """A box of a tensor's record, in elements, and memory of that dtype for all of it; None where
    no memory takes the box as it is stored."""

    def __init__(
        self,
        record: RecordPlace,
        offsets: Sequence[int],
        lengths: Sequence[int],
        dtype: str | None,
        address: int,
    ) -> None: ...

class RangeRead:
    """Bytes [first, first + size) of a record's payload, and memory for them."""

    def __init__(self, record: RecordPlace, first: int, size: int, address: int) -> None: ...

class StagedBox:
    """The box of number ``index``, of which the caller reads ranges into memory of its own."""

    index: int
    dtype: str
    stride: list[int]
    storage_offset: int

class ResolvedReads:
    """Each box is in the plan, staged, or of a record that only torch can read."""

    plan: ReadPlan
    staged: list[StagedBox]
    torch_only: list[int]

class CheckpointReader:
    def __init__(self, directory: bytes | str, direct: bool) -> None: ...
    def open(self, names: Sequence[str], threads: int) -> None: ...
    def resolve(self, boxes: Sequence[BoxRead], threads: int) -> ResolvedReads: ...
    def plan(self, ranges: Sequence[RangeRead]) -> ReadPlan: ...
    def read_objects(self, objects: Sequence[RecordPlace], threads: int) -> list[bytes]: ...

class SavedEntry:
    """What `.metadata` says of a name: a tensor of that size, or an object."""

    is_tensor: bool
    size: list[int]

class ChunkToRead:
    """What one record gives to a box: from where in the record's tensor, to where in the box."""

    record: RecordPlace
    in_record: list[int]
    in_box: list[int]
    sizes: list[int]

class LoadPlanner:
    has_transforms: bool
    def __init__(self, file: bytes, path: bytes | str) -> None: ...
    def names(self) -> list[str]: ...
    def metadata(self) -> Metadata: ...
    def describe(self, names: Sequence[str]) -> list[SavedEntry | None]: ...
    def plan(
        self, boxes: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    ) -> list[list[ChunkToRead]]: ...
    def objects(self, names: Sequence[str]) -> list[RecordPlace]: ...
    def check_covered(self, names: Sequence[str]) -> None: ...
    def check_sizes(self, directory: bytes | str) -> None: ...
    def check_sizes_leniently(self, directory: bytes | str) -> None: ...

class VerifyProblem:
    file: str
    record: str
    message: str

class ReadPlan:
    BUFFER_BYTES: int
    extents: int
    bytes: int
    digest: builtins.bytes
    bytes_read: int
    def read_all(self, threads: int) -> None: ...
    def fill(self, extent: int, buffer: int) -> None: ...
    def deliver(self, extent: int, buffer: int) -> None: ...
    def finish(self) -> None: ...

class PlannedChunk:
    tensor: int
    offsets: list[int]
    sizes: list[int]

class ChunkList:
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> PlannedChunk: ...
    def __iter__(self) -> Iterator[PlannedChunk]: ...

class PlannedFile:
    size: int
    payloads: list[int]
    owners: list[int]
    def __len__(self) -> int: ...
    def places(self, first: int = ..., count: int = ...) -> list[tuple[int, int]]: ...

class EncodedMetadata: ...
class PlannedPaths: ...

class Sharding:
    def __init__(
        self,
        mesh_shape: Sequence[int],
        ranks: Sequence[int],
        shard_dims: Sequence[int],
        whole: bool,
    ) -> None: ...

class TensorToPlan:
    def __init__(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        sharding: int,
        strides: Sequence[int] | None,
        pinned: bool,
    ) -> None: ...

class ProcessIdentity:
    host: int
    boot: int
    pid: int
    start: int
    def __init__(self, host: int, boot: int, pid: int, start: int) -> None: ...

class SaveWriter:
    def __init__(self, process: ProcessIdentity, objects: Sequence[tuple[str, int]]) -> None: ...

class CompleteMetadata:
    encoded: memoryview
    files: list[tuple[str, int]]

class SavePlan:
    def __init__(self, shardings: Sequence[Sharding], tensors: Iterable[TensorToPlan]) -> None: ...
    def complete_metadata(
        self,
        skeleton: Metadata,
        paths: PlannedPaths | None,
        writers: Sequence[SaveWriter],
        save_id: int,
        single_file: bool,
    ) -> CompleteMetadata: ...
    def layout(
        self, chunks: ChunkList, objects: Sequence[int], single_file: bool
    ) -> list[PlannedFile]: ...
    def local_shards(self, rank: int) -> ChunkList: ...
    def paths(
        self, objects: Sequence[str], paths: Iterable[tuple[str | int, ...]]
    ) -> PlannedPaths | None: ...
    def chunks(self, rank: int) -> ChunkList: ...
    def shard_offsets(self, rank: int, tensor: int) -> list[int]: ...

class SharedExchange:
    MAX_MEMBERS: int
    path: str
    peer_failed: bool
    @staticmethod
    def create(members: int) -> SharedExchange: ...
    @staticmethod
    def join(path: str, member: int, members: int) -> SharedExchange: ...
    def run(self, plan: ReadPlan, threads: int, timeout: float) -> None: ...
    def abort(self) -> None: ...

class VerifyReport:
    problems: list[VerifyProblem]
    unchecked: list[str]
    leftovers: list[str]
    files: int
    tensors: int
    objects: int
    bytes: int
    ok: bool

class FileImage:
    offset: int
    address: int
    size: int
    def __init__(self, offset: int = ..., address: int = ..., size: int = ...) -> None: ...

class RecordPart:
    size: int
    def __init__(
        self, name: str, dtype: str, shape: Sequence[int], address: int, first: int, size: int
    ) -> None: ...

class WrittenFile:
    size: int
    direct: bool

class ExpectedFile:
    size: int
    def __init__(self, name: str, size: int, exact: bool) -> None: ...

class CommitRequest:
    def __init__(
        self,
        *,
        directory: bytes | str,
        metadata_name: str,
        claim: str,
        metadata: Buffer,
        files: Sequence[ExpectedFile],
        superseded: Sequence[bytes],
        sync: bool,
    ) -> None: ...

class CleanupResult:
    removed: list[str]
    left: list[str]

class ShardFileWriter:
    def __init__(
        self,
        directory: bytes | str,
        name: str,
        threads: int,
        sync: bool,
        reserve: int,
        image: FileImage,
        copies: Sequence[StagingCopy],
        owners: Sequence[int],
    ) -> None: ...
    def finish(self) -> WrittenFile: ...
    def write_objects(self, objects: Sequence[tuple[str, Buffer]]) -> list[tuple[int, int]]: ...
    def write_tensors(self, parts: Sequence[RecordPart]) -> list[tuple[int, int]]: ...

class StagingCopy:
    bytes: int
    done: bool
    def run(self) -> None: ...
    def finish(self) -> None: ...
    def cancel(self) -> None: ...
    def first_change(self, threads: int) -> int: ...

class StagingParts:
    def __init__(self, parts: Sequence[tuple[int, int, int]]) -> None: ...

class Watch:
    def __len__(self) -> int: ...
    def changed(self) -> int: ...

class Guarded:
    watch: Watch
    unguarded: list[int]
    unguarded_bytes: int

class LiveState:
    fingerprint: bytes
    places: list[int]
    values: list[Any]
    def __init__(self, state_dict: Mapping[str, Any]) -> None: ...
    def address(self, index: int) -> int: ...
    def copies(
        self,
        parts: StagingParts,
        skip: int,
        image: int,
        places: Sequence[int],
        tensors: Sequence[int],
    ) -> StagingCopy: ...
    def find_guarded(
        self, parameters: Sequence[Sequence[torch.Tensor]], optimizers: Sequence[Any]
    ) -> Guarded: ...
    def has_fingerprint(self, known: bytes) -> bool: ...
    def memory(self, index: int) -> torch.Tensor | None: ...
    def replace(self, index: int, tensor: torch.Tensor) -> None: ...
    def tensor(self, index: int) -> torch.Tensor: ...

MAX_METADATA_BYTES: int

def _build_info() -> dict[str, str]: ...
def build_object(data: Buffer, first: int, size: int, what: str, hooks: Any) -> tuple[Any, int]: ...
def pickle_names(data: Buffer, first: int, size: int, what: str) -> set[tuple[str, str]]: ...
def object_archive(data: Buffer, what: str) -> dict[str, tuple[int, int]] | None: ...
def claim_directory(
    directory: bytes | str, metadata_name: str, save_id: int, overwrite: bool
) -> str: ...
def commit_checkpoint(request: CommitRequest) -> CleanupResult: ...
def crc32(address: int, size: int, seed: int) -> int: ...
def data_file_name(rank: int, save_id: int, number: int) -> str: ...
def decode_metadata(file: Buffer, path: bytes | str) -> Metadata: ...
def encode_metadata(metadata: Metadata) -> bytes | None: ...
def is_running(process: ProcessIdentity, modified: int) -> bool | None: ...
def is_in_memory(path: bytes | str) -> bool: ...
def make_directories(path: bytes | str, sync: bool) -> None: ...
def mark_metadata(file: Buffer, run: int, commit: int) -> bytes: ...
def metadata_files(file: Buffer, path: bytes | str) -> list[bytes]: ...
def metadata_trailer(pickle: Buffer) -> bytes: ...
def new_save_id(claimed: bool) -> int: ...
def owner_of(name: bytes | str) -> ProcessIdentity | None: ...
def process_identity() -> ProcessIdentity: ...
def read_metadata_file(directory: bytes | str, name: bytes | str) -> bytes: ...
def read_run_mark(directory: bytes | str) -> tuple[int, int] | None: ...
def record_bytes(dtype: str, shape: Sequence[int]) -> int: ...
def record_dtypes() -> list[str]: ...
def record_owner(name: str, chunk: Sequence[int]) -> int: ...
def release_claim(directory: bytes | str, claim: str) -> None: ...
def remove_leftovers(
    directory: bytes | str,
    metadata_name: str,
    claim: str,
    own: Sequence[ProcessIdentity],
    sync: bool,
) -> CleanupResult: ...
def shard_rows(rows: int, shards: int, shard: int) -> ShardRows: ...
def sync_directory(path: bytes | str) -> None: ...
def torch_file_prefix(rank: int, save_id: int) -> str: ...
def verify(directory: bytes | str, threads: int) -> VerifyReport: ...

# Tests call these two; only builds with tests have them.
def _inject_fault(fault: Callable[[str, str], int] | None) -> None: ...
def _copied_bytes() -> int: ...
def _leave_out(name: str) -> None: ...
def _orderings_seen() -> list[str]: ...

class ShardRows:
    """The rows of a dimension that one shard holds: [first, first + count)."""

    first: int
    count: int

class BackwardPrefetch:
    """When backward starts the next unit's gather."""

    NONE: BackwardPrefetch
    PRE: BackwardPrefetch
    POST: BackwardPrefetch
    name: str
    value: int

class ReshardAfterForward:
    """When a forward frees the full parameters of a unit."""

    UNLESS_BACKWARD_IS_NEXT: ReshardAfterForward
    ALWAYS: ReshardAfterForward
    NEVER: ReshardAfterForward
    name: str
    value: int

class ReadTurn:
    """What a reader of the sharded parameters gets who asks for the turn."""

    TAKEN: ReadTurn
    HELD: ReadTurn
    BUSY: ReadTurn
    name: str
    value: int

class GradAccumulation:
    """What gradients are added up in that wait for a later backward to reduce them: as autograd
    leaves them, or in the reduction's dtype; then either the wrapper casts their sum when a
    backward is over, or autograd each of its terms."""

    COMPUTED: GradAccumulation
    REDUCED: GradAccumulation
    REDUCED_BY_AUTOGRAD: GradAccumulation
    name: str
    value: int

class ShardMemory:
    DEVICE: ShardMemory
    HOST: ShardMemory
    PINNED: ShardMemory
    name: str
    value: int

class UnitPrecision:
    """The dtypes that a unit reduces in; None: as computed (as stored with
    ``REDUCED_BY_AUTOGRAD``)."""

    def __init__(
        self,
        *,
        reduce_dtype: torch.dtype | None = None,
        keep_low_precision_grads: bool = False,
        accumulation: GradAccumulation = ...,
    ) -> None: ...

class StoredParam:
    """One parameter as its unit stores it: ``sizes`` of this rank's part of it, of which the shards
    cut dimension ``dim``. ``param_dtype``: it computes in; None: as stored.
    ``is_summed_elsewhere``: its gradient may come as a summand over mesh dimensions that the unit
    does not know of. ``is_dtensor``: the full parameter is one, and its gradient.
    ``is_extended``: an ``Extension`` gathers it."""

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        param_dtype: torch.dtype | None = None,
        is_summed_elsewhere: bool = False,
        is_dtensor: bool = False,
        is_extended: bool = False,
    ) -> None: ...

class Extension:
    """Gathers a unit's extended parameters: begins with it, makes them full, frees them."""

    def __init__(
        self,
        *,
        start: Callable[[], None],
        finish: Callable[[], None],
        free: Callable[[], None],
    ) -> None: ...

class Collectives:
    def __init__(self, shard_group: str, replica_group: str | None, rank: int) -> None: ...
    def set_reduce_groups(self, shard_group: str, replica_group: str | None) -> None: ...
    def set_peers(self, peers: Peers) -> None: ...

class Peers:
    def __init__(self, group: str, ranks: Sequence[int], channel: int) -> None: ...

def keep_if_pending(group: str) -> None: ...
def fill_slots(
    entries: Sequence[tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]],
) -> None: ...
def first_replaced(
    entries: Sequence[tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]],
) -> int | None: ...
def have_gradients(parameters: Sequence[torch.Tensor]) -> bool: ...
def set_gradients(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> None: ...
def count_holders(tensors: Sequence[torch.Tensor]) -> list[int]: ...

class Unit:
    name: str
    sync: bool
    reshard_after_forward: ReshardAfterForward
    reshard_after_backward: bool
    unshard_in_backward: bool
    is_watched: bool
    @property
    def is_unsharded(self) -> bool: ...
    def set_forward_prefetch(self, units: Sequence[Unit]) -> None: ...
    def set_backward_prefetch(self, units: Sequence[Unit]) -> None: ...
    def __init__(
        self,
        *,
        parameters: Sequence[StoredParam],
        device: torch.device,
        collectives: Collectives,
        precision: UnitPrecision,
        on_backward: Callable[[], None],
        on_reduced: Callable[[], None],
        local_grad: Callable[[int, torch.Tensor], torch.Tensor],
        extension: Extension | None = None,
        memory: ShardMemory = ...,
    ) -> None: ...
    def set_all_reduce(self, all_reduce: bool) -> None: ...
    keep_memory: bool
    reductions_in_flight: int
    def set_gather_comm(
        self,
        allocate: Callable[[int, torch.dtype, torch.device], torch.Tensor] | None,
        run: Callable[[torch.Tensor, torch.Tensor, bool], None] | None,
    ) -> None: ...
    def set_reduce_comm(
        self,
        allocate: Callable[[int, torch.dtype, torch.device], torch.Tensor] | None,
        run: Callable[[torch.Tensor, torch.Tensor, bool], None] | None,
    ) -> None: ...
    def set_force_sum(self, force_sum: bool) -> None: ...
    def set_reshard_to(self, fewer: Collectives | None) -> None: ...
    def set_comm_hook(self, hook: Callable[[torch.Tensor, torch.Tensor | None], None]) -> None: ...
    def set_all_reduce_hook(self, hook: Callable[[torch.Tensor], None] | None) -> None: ...
    def set_divide_factor(self, factor: float | None) -> None: ...
    def shard(self, full: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...
    def rebind(
        self, shards: Sequence[torch.Tensor], device: torch.device
    ) -> list[torch.Tensor]: ...
    def empty_full(self) -> list[torch.Tensor]: ...
    def drop_kept(self) -> None: ...
    def join_grads(self) -> None: ...
    def empty_grads(self) -> list[torch.Tensor]: ...
    def free_grads(self, shards: Sequence[torch.Tensor]) -> None: ...
    def unused(self) -> list[int]: ...
    def write_grads(
        self, targets: Sequence[torch.Tensor | None], accumulate: Sequence[bool]
    ) -> None: ...

class Schedule:
    def __init__(
        self,
        backward_prefetch: BackwardPrefetch,
        rank: int,
        peers: Peers | None,
        on_backward_end: Callable[[], None],
    ) -> None: ...
    def set_last_backward(self, last: bool) -> None: ...
    def finalize_backward(self, wait: bool) -> None: ...
    def finish_reductions(self) -> None: ...
    def owes(self) -> bool: ...
    def take_turn(self) -> ReadTurn: ...
    def begin_read(self) -> ReadTurn: ...
    def begin_read_if_quiet(self) -> ReadTurn: ...
    def end_read(self) -> None: ...
    def running_here(self) -> bool: ...
    def add(
        self,
        unit: Unit,
        full: Sequence[torch.Tensor],
        memory: Sequence[torch.Tensor | None],
        trainable: Sequence[int],
    ) -> None: ...
    def enter_forward(self, unit: Unit, grad_enabled: bool) -> None: ...
    def expect_hidden_graph(self) -> None: ...
    def leave_forward(self, unit: Unit, outputs: Sequence[torch.Tensor]) -> None: ...
    def abort_forward(self, unit: Unit) -> None: ...
    def start_unshard(self, unit: Unit) -> None: ...
    def unshard(self, unit: Unit) -> None: ...
    def release(self, unit: Unit) -> None: ...
    def reset(self) -> None: ...
