"""Programs that use torch_hsdp_ckpt as a user would: by its public names only. Not part of the
wheel."""
