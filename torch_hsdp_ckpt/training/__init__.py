"""A training run's checkpoints: when to save, which to keep, which to go on from, and what to do on
SIGTERM.

May import: ``common`` and ``checkpoint``. In come steps and states of a training loop; out come
directories by step."""
