"""orthofast."""
