"""What the commands share on a terminal: logs, quiet libraries, and errors on one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback

from rich.console import Console
from rich.logging import RichHandler

from rlprompt.tracking.console import clean_text

_MAX_LINE = 4000


def report_error(error: Exception) -> None:
    """Write `error: ...` as one line to stderr; with RLPROMPT_DEBUG=1 the traceback before it.

    Paths and values inside the sentence may come from anywhere, so control characters are taken
    out; a line is never wrapped, so that a script can read it.
    """
    if os.environ.get("RLPROMPT_DEBUG") == "1":
        sys.stderr.write("".join(traceback.format_exception(error)))
    sys.stderr.write(f"error: {clean_text(str(error), _MAX_LINE, sys.stderr.encoding)}\n")


def setup_logging(console: Console, level: int, verbose: bool = False) -> None:
    """Send log records to a console, and keep what other libraries say to what matters.

    On a terminal records are drawn by rich, so that they do not tear a live display on the same
    console; elsewhere they are plain lines of any length.

    Args:
        console: the console that records go to.
        level: the lowest level of rlprompt's own records.
        verbose: whether everything of rlprompt is shown, and what other libraries inform about.
    """
    # Read when transformers and tokenizers are imported, which the commands do after this.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console,
            show_path=verbose,
            omit_repeated_times=False,
            log_time_format="%H:%M:%S",
        )
        handler.setFormatter(_CleanFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_CleanFormatter("%(levelname)s %(message)s"))
    logging.captureWarnings(True)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True
    )
    logging.getLogger("rlprompt").setLevel(logging.DEBUG if verbose else level)
    # Fetching a model takes minutes: it is said whatever the level.
    logging.getLogger("rlprompt.model.files.folder").setLevel(
        logging.DEBUG if verbose else logging.INFO
    )
    for name in ("py.warnings", "transformers", "huggingface_hub", "datasets", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.ERROR)
    for name in ("matplotlib", "urllib3", "httpx", "fsspec", "asyncio", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What clients send that is no HTTP is told to them; here it would be theirs to fill the log.
    logging.getLogger("uvicorn").setLevel(logging.NOTSET if verbose else logging.CRITICAL)


class _CleanFormatter(logging.Formatter):
    """Records quote queries and paths: they must not carry control characters to the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return clean_text(super().formatMessage(record), _MAX_LINE)
