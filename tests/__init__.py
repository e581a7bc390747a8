"""Tests of orthofast; a package, so that another one of this name in the environment is not taken for it."""
