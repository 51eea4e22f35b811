"""Waiting for a server of a job: `python -m rlprompt.slurm.readiness`, in the batch script.

The words of the training command say where it will be asked: each that names the server's address
with a port. It is ready when all of these answer. A server of HTTP answers with any status below
500, as one that is still loading says 503; any other accepts a connection.

Stands on Python alone, as it is the first thing that a job starts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

_PAUSE_S = 1.0
_ANSWER_S = 10.0
_LOADING = 500
"""Statuses from here on are not an answer."""


def places(words: Sequence[str], server: str) -> list[str]:
    """Where a command will ask a server: `http://HOST:PORT/`, or `tcp://HOST:PORT` without scheme.

    Args:
        words: the command, with the address in it.
        server: the address, of IPv6 in brackets.

    Returns:
        Each place once, in the order of the words.
    """
    named = re.compile(rf"(?:(https?)://)?(?<![\w.:-]){re.escape(server)}(?::(\d+))?(?![\w.-])")
    found = []
    for word in words:
        for scheme, port in named.findall(word):
            if scheme:
                found.append(f"{scheme}://{server}{':' + port if port else ''}/")
            elif port:
                found.append(f"tcp://{server}:{port}")
    return list(dict.fromkeys(found))


def answers(place: str) -> bool:
    """Whether a server answers at a place, as `places` names it."""
    scheme, _, rest = place.partition("://")
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        with contextlib.suppress(OSError, OverflowError):
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
            return True
        return False
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(place, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return error.code < _LOADING
    except (OSError, ValueError):
        # A certificate that this machine does not know is an answer too.
        return scheme == "https" and answers(f"tcp://{_with_port(rest)}")
    except Exception:  # http.client.HTTPException: what answers speaks something else
        return True
    return True


def _with_port(rest: str) -> str:
    host = rest.rstrip("/")
    return host if re.search(r":\d+$", host) and not host.endswith("]") else f"{host}:443"


def wait(waiting: Sequence[str], seconds: float, process: int | None = None) -> str:
    """Wait until a server answers everywhere; returns what went wrong, empty if nothing did.

    Args:
        waiting: places as `places` names them.
        seconds: how long to wait.
        process: its process on this machine, after whose end nothing will answer; None = unknown.
    """
    end = time.monotonic() + seconds
    left = list(waiting)
    while True:
        left = [place for place in left if not answers(place)]
        if not left:
            return ""
        if process is not None and not _runs(process):
            return f"the server has ended before it answered at {left[0]}; its last lines follow"
        if time.monotonic() >= end:
            return (
                f"the server gave no answer at {left[0]} within {seconds:g} s; its last lines "
                "follow; raise server_wait_s of the cluster file if it needs longer"
            )
        time.sleep(_PAUSE_S)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{process}/stat", "rb") as handle:
        return handle.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait as the command line says; returns 0 when the server answers.

    Args:
        arguments: words of the command line; None = those of this process.
    """
    parser = argparse.ArgumentParser(prog="rlprompt.slurm.readiness", description=__doc__)
    parser.add_argument("--server", required=True, help="Its address, as the words have it.")
    parser.add_argument("--seconds", type=float, required=True, help="How long to wait.")
    parser.add_argument("--process", type=int, help="Its process here.")
    parser.add_argument("words", nargs="*", help="The training command.")
    asked = parser.parse_args(arguments)
    waiting = places(asked.words, asked.server)
    if not waiting:
        sys.stdout.write("no word names the server with a port: it is not waited for\n")
        return 0
    sys.stdout.write(f"waiting for the server at {', '.join(waiting)}\n")
    sys.stdout.flush()
    problem = wait(waiting, asked.seconds, asked.process)
    sys.stdout.write(f"error: {problem}\n" if problem else "the server answers\n")
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
