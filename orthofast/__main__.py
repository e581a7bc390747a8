"""``python -m orthofast`` is the command ``orthofast``."""

from orthofast.cli import main

if __name__ == "__main__":
    main()
