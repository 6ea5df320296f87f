"""Hybrid-sharded data parallelism: torch FSDP's two faces over the C++ core (``csrc/hsdp``).

May import: ``common``. In come modules, meshes and policies of the user; out come the same modules
with DTensor parameters, whose forward and backward gather and reduce. ``fsdp.py`` and
``fully_shard.py`` are the faces, ``unit.py`` is one wrapped module's parameters, ``root.py`` what
all units of a model share, ``runner.py`` the hooks around forward."""
