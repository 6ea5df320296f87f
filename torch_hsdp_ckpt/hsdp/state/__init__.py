"""State dicts of wrapped modules and their optimizers: out, in, and whole.

May import: ``common`` and the ``hsdp`` room around it. In come modules and optimizers, or state
dicts to load; out come sharded DTensors without a copy, whole tensors on rank 0, and loads that
check everything before they change anything."""
