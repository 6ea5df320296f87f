"""A checkpoint's files: data files of records, ``.metadata``, and objects as pickles.

May import: ``common``. In come names, byte ranges and tensors; out come files in a directory, and
tensors filled from them. The bytes are moved and checked in ``csrc/checkpoint``;
``FileSystemWriter`` and ``FileSystemReader`` are also drop-ins for torch.distributed.checkpoint's
classes of these names."""
