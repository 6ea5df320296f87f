"""Loads: which records a state needs, who reads them, and how replicas hand them on.

May import: ``common`` and ``checkpoint.storage``. In come a state dict to fill and a process group;
out comes the state filled in place, every byte checked, or an error on every rank."""
