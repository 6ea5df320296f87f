"""Checkpoints in torch.distributed.checkpoint's format: planned without talking, written durably,
loaded checked.

May import: ``common``. In come state dicts of DTensors, tensors and plain values; out come
directories that stock torch reads, and states that are loaded whole or not at all. Inside:
``storage`` knows files, ``snapshot`` knows copies of a state, ``save`` and ``load`` know ranks;
each imports only what stands before it in this sentence."""
