"""Loads: which records a state needs, who reads them, and how replicas hand them on.

May import: ``common`` and ``checkpoint.storage``. In come a state dict to fill and a process group;
out comes the state filled in place, every byte checked, or an error on every rank.

A load is a row of values, each made from the one before, in ``load.py``: ``Opened`` (``open.py``:
all ranks have the same `.metadata`), ``Planned`` (``plan.py``: files are open, it is known which
bytes go where), ``Read`` (``read.py``: tensors are filled), ``Applied`` (``apply.py``: objects are
in their place). ``planner.py`` asks planners that are not DCP's default one, ``state_reads.py``
finds the records of a state dict, ``exchange.py`` hands bytes from rank to rank, ``ranks.py`` knows
who they are. What ``dcp.load`` through ``FileSystemReader`` shares with this is in ``storage``."""
