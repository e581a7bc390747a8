"""The commands of ``orthofast``, one file each; only results go to stdout."""
