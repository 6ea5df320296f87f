"""Optimizers whose steps need whole matrices, over sharded parameters.

May import: ``common``. In come optimizers and DTensors; out come steps for which each matrix was
whole on one rank only.

``muon.py`` is ``torch.optim.Muon``; ``whole_tensors.py``, which it is built on, is for optimizers
of one's own. It brings tensors to their owners, round by round, and the results back. ``plan.py``
says who owns which tensor and what moves in which round, ``layout.py`` which part of a tensor each
rank holds, ``transfer.py`` moves it, and ``agree.py`` finds out before that whether all ranks have
come with the same tensors."""
