"""`python -m rlprompt`: the command line, for places where no script is on the path."""

from __future__ import annotations

from rlprompt.cli.main import main

if __name__ == "__main__":
    main()
