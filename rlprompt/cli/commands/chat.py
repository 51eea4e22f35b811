"""`rlprompt chat`: answers on the terminal, from questions typed, piped, or given as options."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlprompt.cli.commands.terminal import report_error, setup_logging
from rlprompt.errors import InputError
from rlprompt.serving.chat import Answer, Chat, ChatOptions, open_chat, printable
from rlprompt.tracking.console import PlainConsole

_SIDE_BY_SIDE = 90
"""Columns of a terminal from which on answers stand beside each other."""
_HELP = "/reset forgets the conversation, /quit ends it"


def run(
    artifact: Path,
    queries: Sequence[str],
    options: ChatOptions,
    *,
    as_json: bool = False,
    verbose: bool = False,
) -> None:
    """Answer the queries, each in a conversation of its own; without any, those read from stdin.

    Answers go to stdout, everything else to stderr.

    Args:
        artifact: folder of an artifact, or of a run.
        queries: questions to answer.
        options: what differs from how the artifact was trained.
        as_json: whether answers are JSON, one object per question and line.
        verbose: whether to log more.

    Raises:
        InputError: see `open_chat`; a query is empty or too long.
    """
    notes, console = PlainConsole(stderr=True), PlainConsole()
    setup_logging(notes, logging.WARNING, verbose)
    if any(not query.strip() for query in queries):
        raise InputError("--query is empty; give it a text")
    with notes.status("loading"):
        chat = open_chat(artifact, options)
    if not queries:
        _converse(chat, console, notes, as_json)
        return
    for number, query in enumerate(queries):
        chat.reset()
        answers = _ask(chat, query, notes)
        if as_json:
            _write_json(query, answers)
            continue
        if len(queries) > 1:
            console.print(Text(f"> {printable(query)}", style="bold"), soft_wrap=True)
        _show(answers, chat, console)
        if number + 1 < len(queries):
            console.print()


def _write_json(query: str, answers: Mapping[str, Answer]) -> None:
    said = {name: {"text": a.text, "terminated": a.terminated} for name, a in answers.items()}
    # In ASCII: for any terminal, whatever the base has said.
    sys.stdout.write(json.dumps({"query": query, "answers": said}) + "\n")
    sys.stdout.flush()


def _converse(chat: Chat, console: Console, notes: Console, as_json: bool) -> None:
    """Read lines until the end of the input or /quit; a conversation that is too long goes on."""
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        own = " Each prompt keeps its own history." if len(chat.names) > 1 else ""
        notes.print(Text(f"{_HELP}.{own}", style="dim"))
    for line in _lines(interactive):
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            chat.reset()
            notes.print(Text("a new conversation", style="dim"))
        elif command == "/help":
            notes.print(Text(_HELP, style="dim"))
        elif command:
            try:
                answers = _ask(chat, line, notes)
            except InputError as error:
                report_error(error)
                notes.print(Text("the conversation may be too long: /reset begins a new one"))
                continue
            if as_json:
                _write_json(line, answers)
                continue
            _show(answers, chat, console)
            console.print()


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` editing and a history
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return


def _ask(chat: Chat, text: str, notes: Console) -> Mapping[str, Answer]:
    if not notes.is_terminal:
        return chat.ask(text)
    with notes.status("answering") as status:
        return chat.ask(
            text, lambda name, done, limit: status.update(f"{name}: {done} of {limit} tokens")
        )


def _show(answers: Mapping[str, Answer], chat: Chat, console: Console) -> None:
    texts = {name: _text(answer, chat, console) for name, answer in answers.items()}
    if len(texts) == 1:
        console.print(*texts.values(), soft_wrap=not console.is_terminal)
        return
    if console.is_terminal and console.width >= _SIDE_BY_SIDE:
        table = Table(expand=True, show_lines=False)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*texts.values())
        console.print(table)
        return
    for name, text in texts.items():
        console.print(Text(f"[{name}] ", style="bold").append_text(text), soft_wrap=True)


def _text(answer: Answer, chat: Chat, console: Console) -> Text:
    encoding = console.encoding or "utf-8"
    text = Text(printable(answer.text).encode(encoding, "replace").decode(encoding))
    if not answer.terminated:
        text.append(f" ... (cut at {chat.sampling.max_tokens} tokens)", style="dim")
    return text
