"""A rank's part of a state, copied to host memory so that training may go on while it is written.

May import: ``common`` and ``checkpoint.storage``. In come the tensors that this rank writes; out
come images of its files, and the records that point into them."""
