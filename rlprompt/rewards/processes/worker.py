"""The process of an isolated reward.

`isolation` starts it as `python -m rlprompt.rewards.processes.worker`. It reads calls from its
standard input and writes results to what was its standard output; what the reward itself prints
goes to standard error. Calls arrive pickled, from the run that started this process; results go
back as JSON, so that nothing in the run executes what user code made.

A call that takes too long is ended from inside by `faulthandler`. Its timer is a C thread: it also
fires when the reward holds the interpreter lock, it tells the line on which the reward hangs, and
it ends this process even when the run is gone.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import json
import os
import pickle
import queue
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from rlprompt.errors import InputError, describe_error, shorten
from rlprompt.rewards.base import RewardFunction, RewardSettings
from rlprompt.rewards.load import load_reward
from rlprompt.rewards.processes.execution import is_async
from rlprompt.rewards.processes.pipe import read_message, write_message
from rlprompt.rewards.validation import NOT_A_LIST, Sink, source_file, user_place

_GIB = 2**30


def main() -> None:
    """Load the reward that the first message names, then serve calls until the input ends."""
    calls, results = _claim_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # they are the run's; handlers do not outlive exec
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_feed, args=(calls, jobs), daemon=True).start()
    start = pickle.loads(jobs.get())
    sys.path[:] = start["sys_path"]
    try:
        settings = RewardSettings.model_validate(start["settings"])
        reward = load_reward(settings, Path(start["base_dir"]), start["builtin"])
        write_message(results, _to_json(_describe(reward)))
    except InputError as error:
        write_message(results, _to_json({"input_error": str(error)}))
        return
    _limit_memory(start["memory_gb"])
    loop = asyncio.Runner()  # one for all calls: clients that a reward keeps belong to their loop
    while True:
        message = jobs.get()
        if start["timeout"] is not None:
            faulthandler.dump_traceback_later(start["timeout"], exit=True, file=sys.stderr)
        result = _serve(reward, message, loop)
        faulthandler.cancel_dump_traceback_later()
        write_message(results, result)


def _claim_streams() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes, under descriptors that user code does not know."""
    calls = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return calls, results


def _feed(calls: BinaryIO, jobs: queue.SimpleQueue[bytes]) -> None:
    """Pass calls on; when the run closes the pipe or is gone, end this process at once."""
    while (message := read_message(calls)) is not None:
        jobs.put(message)
    os._exit(0)


def _limit_memory(gigabytes: float | None) -> None:
    if gigabytes is None:
        return
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    limit = held + int(gigabytes * _GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _describe(reward: RewardFunction) -> dict[str, Any]:
    """What the run must know to call the reward as if it had loaded it."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        parameters = inspect.signature(lambda **kwargs: None).parameters.values()
    return {
        "parameters": [[p.name, int(p.kind), p.default is not p.empty] for p in parameters],
        "bound": list(getattr(reward, "keywords", {})),
        "source": source_file(reward),
    }


def _serve(reward: RewardFunction, message: bytes, loop: asyncio.Runner) -> bytes:
    """One call to one result; whatever the reward raises becomes a sentence."""
    sink = Sink()
    logs = {"log_extra": sink.log_extra, "log_metric": sink.log_metric}
    try:
        call = pickle.loads(message)
        kwargs = call["kwargs"] | {name: logs[name] for name in call["logs"]}
        output = reward(**kwargs)
        if is_async(reward):
            output = loop.run(_awaited(output))
        if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
            output = output.tolist()
        if not isinstance(output, list | tuple):
            if inspect.iscoroutine(output):
                output.close()
            told = f"returned a value of type {type(output).__name__}, not a list; {NOT_A_LIST}"
            return _to_json({"unusable": told})
        return _to_json({"output": output, "extras": sink.extras, "metrics": sink.metrics})
    except InputError as error:
        return _to_json({"input_error": str(error)})
    except BaseException as error:  # sys.exit in user code must not end the worker unseen
        where = user_place(error, reward)
        return _to_json({"raised": f"{describe_error(error)} at {where}"})


async def _awaited(output: Any) -> Any:
    return await output


def _to_json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, default=_plain).encode()


def _plain(value: Any) -> Any:
    """A tensor or array as numbers, and anything else as its text."""
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return value.tolist()
    return shorten(repr(value))


if __name__ == "__main__":
    main()
