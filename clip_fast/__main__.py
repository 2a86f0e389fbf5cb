"""`python -m clip_fast`: the command line, as `clip-fast`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
