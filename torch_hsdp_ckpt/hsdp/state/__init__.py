"""State dicts of wrapped modules and their optimizers: out, in, and whole.

May import: ``common`` and the ``hsdp`` room around it. In come modules and optimizers, or state
dicts to load; out come sharded DTensors without a copy, whole tensors on rank 0, and loads that
check everything before they change anything.

``module_state_dict`` and ``optimizer_state_dict`` are what users call. For each of the two,
``_out`` is how a sharded state comes out, ``_plan`` checks a state to be loaded on all ranks, and
``_in`` applies the plan. ``_mismatch`` says why a value does not fit. ``whole`` gathers shards to
whole tensors, ``cut`` goes the other way, ``initial_state`` is that of an optimizer before its
first step, ``sharded_tensors`` turns torch's older kind into DTensors, ``placement`` says how a
tensor lies on a mesh."""
