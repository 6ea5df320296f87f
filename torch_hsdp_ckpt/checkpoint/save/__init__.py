"""Saves: which rank writes which bytes, the order of phases, and the one rename that commits.

May import: ``common``, ``checkpoint.storage`` and ``checkpoint.snapshot``. In come a state dict and
a process group; out come a committed checkpoint and a ``SaveResult``, or an error on every rank
with nothing lost.

A save is read downwards: ``save.py`` calls ``open.py`` (ranks compare what they hold), ``plan.py``
(what this rank writes), ``stage.py`` (from where), ``write.py`` (its files) and ``commit.py`` (one
vote, one rename); each takes the frozen value that the one before has made. ``async_call.py``
looks at the state in the call of ``async_save`` (``capture.py``) and copies what nothing guards;
``async_job.py`` runs the same functions on a thread, and copies the other tensors
(``late_copy.py``) behind the gate of ``common.gate``."""
