"""Files that a save leaves when it does not end, and who removes them."""

import logging
import os
from collections.abc import Iterable, Sequence

from ... import _C
from ...errors import CheckpointError
from .directory import encoded

_logger = logging.getLogger(__name__)


def make_room(
    directory: str | os.PathLike[str],
    metadata_name: str,
    claim: str,
    sync: bool,
    own: Sequence[_C.ProcessIdentity] = (),
) -> None:
    """Removes what saves that have ended left in a directory that ``claim`` holds, before this one
    needs the room. ``own``: processes of which no save there is under way. What can't be removed
    stays: the save itself may still have room."""
    try:
        result = _C.remove_leftovers(encoded(directory), metadata_name, claim, own, sync)
    except (CheckpointError, OSError) as error:
        _logger.warning("%s: leftovers of other saves are left: %s", directory, error)
        return
    if result.removed:
        _logger.info(
            "%s: removed %d files of saves that did not end", directory, len(result.removed)
        )
    for reason in result.left:
        _logger.warning("a leftover of another save could not be removed: %s", reason)


def remove_quietly(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Removes this rank's own files after its own failure, whose error is the one to be seen."""
    for name in names:
        try:
            os.unlink(os.path.join(directory, name))
        except FileNotFoundError:
            continue
        except OSError as error:
            _logger.warning(
                "%s/%s could not be removed after a failed save: %s", directory, name, error
            )
