"""What every room may use: agreement between ranks, tensors as bytes, and the gate that training
waits at.

May import: ``errors`` and ``_C``. In come process groups, tensors and optimizers; out go answers
that are the same on every rank, contiguous memory, and the guarantee that nothing changes a state
that is still being copied."""
