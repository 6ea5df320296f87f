"""Hybrid-sharded data parallelism: torch FSDP's two faces over the C++ core (``csrc/hsdp``).

May import: ``common``. In come modules, meshes and policies of the user; out come the same modules
with DTensor parameters, whose forward and backward gather and reduce.

``fsdp.py`` and ``fully_shard.py`` (with ``fsdp_module.py``) are the faces; ``arguments.py``,
``meshes.py``, ``precision.py``, ``wrap.py`` and ``materialize.py`` turn what they are given into
what a unit takes. ``unit.py`` is one wrapped module's parameters: ``slots.py`` says where they are
registered, ``shards.py`` makes the DTensors, ``gradients.py`` takes what a reduction has left,
``adoption.py`` gives the DTensors to optimizers that hold the parameters of before, and
``optimizers.py`` refuses those that can't step on them. ``runner.py`` gathers around a forward;
``results.py`` and ``flat_tensors.py`` find the tensors that it takes and leaves, ``transforms.py``
tells of ``torch.func``. ``root.py`` is what all units of a model share, and ``groups.py`` the
process groups that it makes. ``state/`` is state dicts, out and in."""
