"""Saves: which rank writes which bytes, the order of phases, and the one rename that commits.

May import: ``common``, ``checkpoint.storage`` and ``checkpoint.snapshot``. In come a state dict and
a process group; out come a committed checkpoint and a ``SaveResult``, or an error on every rank
with nothing lost."""
