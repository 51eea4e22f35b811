"""The process in which a JSON schema is tried out; see `rlprompt.engines.grammar`.

It is run as a script and imports nothing of rlprompt. The schema comes as JSON on stdin; what is
wrong with it goes to stdout, nothing where it can be used. A schema can overflow the stack of the
library that reads it, or keep it busy: the kernel then ends this process and not the server.
"""

from __future__ import annotations

import importlib
import resource
import sys
from typing import Any

OPTIONS: dict[str, Any] = {
    # White space as `json.dumps` writes it: a small model that may go on with blanks does so until
    # its last token.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
"""How a schema is read; a schema cannot change it by `x-guidance`."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "max_items_in_row": 10_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""What reading a schema, and one token under it, may take; llguidance's own units."""


def main() -> None:
    """Try the schema on stdin."""
    cpu_seconds, memory_bytes = (int(word) for word in sys.argv[1:3])
    llguidance: Any = importlib.import_module("llguidance")

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            sys.stdin.buffer.read().decode(), overrides=OPTIONS
        )
    except ValueError as error:
        sys.stdout.write(str(error))
        return
    limits = llguidance.LLParserLimits(**LIMITS)
    is_wrong, told = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if is_wrong:
        sys.stdout.write(told[0])


if __name__ == "__main__":
    main()
