"""Runs the command line as `python -m clip_fast`."""

import sys

from .cli.main import main

sys.exit(main())
