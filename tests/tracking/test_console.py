from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlprompt.tracking.console import (
    PlainConsole,
    TrainingDisplay,
    clean_text,
    format_number,
    format_seconds,
    sparkline,
)

LOW, HIGH = "\u2581", "\u2588"
METRICS = {
    "reward": -0.5,
    "kl": 0.02,
    "entropy": float("nan"),
    "completions/mean_length": 31.25,
    "grad_norm": 0.4,
    "step_time": 2.0,
}
HOSTILE = {
    "query": "What is [bold]this[/bold]?\x1b[2J",
    "completion": "[/] \x1b]0;owned\x07 \u202eevil\r\nline [link=file:///etc]x[/link] "
    + "w " * 5000,
    "reward": 1.0,
}


def display(terminal: bool, encoding: str = "utf-8") -> tuple[TrainingDisplay, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True, newline="")
    console = Console(file=stream, force_terminal=terminal, color_system=None, width=100, height=50)
    return TrainingDisplay(console, "run [red]one[/red]", steps=4), raw


def feed(shown: TrainingDisplay) -> None:
    shown.show_evaluation(0, "base", {"reward": -2.0, "reward_sem": 0.125})
    for step in (1, 2):
        shown.show_step(step, METRICS)
    shown.show_sample(HOSTILE)
    shown.show_evaluation(2, "learned", {"reward": -0.25, "reward_sem": None})
    shown.close("all done")
    shown.close()


def test_a_log_file_gets_one_plain_line_per_event() -> None:
    shown, raw = display(terminal=False)
    feed(shown)
    lines = raw.getvalue().decode().splitlines()
    assert lines == [
        "run [red]one[/red]: steps 0 to 4",
        "step 0/4: held-out base -2 +- 0.125",
        "step 1/4: reward -0.5, kl 0.02, entropy -, length 31.25, grad norm 0.4, s/step 2, "
        "left 0:00:06",
        "step 2/4: reward -0.5, kl 0.02, entropy -, length 31.25, grad norm 0.4, s/step 2, "
        "left 0:00:04",
        "step 2/4: held-out learned -0.25",
        "all done",
    ]


def test_the_live_panel_shows_the_run() -> None:
    shown, raw = display(terminal=True)
    feed(shown)
    text = raw.getvalue().decode()
    for expected in ("step 2/4", "50%", "0:00:04 left", "31.25", "base -2 +- 0.125", "all done"):
        assert expected in text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_hostile_completion_reaches_the_terminal_as_text() -> None:
    shown, raw = display(terminal=True)
    feed(shown)
    text = raw.getvalue().decode()
    assert "What is [bold]this[/bold]? [2J" in text
    assert "[link=file:///etc]x[/link]" in text
    assert "\x07" not in text and "\u202e" not in text and "\x1b]" not in text
    # What is left are the cursor movements of the live display itself.
    assert set(re.findall(r"\x1b\[[?0-9;]*([A-Za-z])", text)) <= {"A", "K", "h", "l"}
    assert max(text.count("w w w"), 0) < 200


def test_an_ascii_terminal_gets_ascii() -> None:
    shown, raw = display(terminal=True, encoding="ascii")
    shown.show_step(1, METRICS)
    shown.show_sample({"query": "\u00fcber", "completion": "\u2581", "reward": None})
    shown.close()
    text = raw.getvalue().decode("ascii")
    assert "?ber" in text and "reward" in text


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 8, ""),
        ([0.0, 1.0], 8, LOW + HIGH),
        ([3.0, 3.0, 3.0], 8, "\u2584" * 3),
        ([0.0, None, 1.0], 8, f"{LOW} {HIGH}"),
        ([float("nan"), float("inf")], 8, "  "),
        ([0.0, 0.0, 1.0, 1.0], 2, LOW + HIGH),
        (list(range(8)), 8, "".join(chr(0x2581 + index) for index in range(8))),
    ],
)
def test_sparkline(values: list[float | None], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_sparkline_keeps_to_its_width_and_uses_every_value() -> None:
    assert len(sparkline(range(1000), 30)) == 30
    # The lone peak is in the last bin, whatever the rounding of the bins.
    assert sparkline([0.0] * 96 + [9.0], 10).endswith(HIGH)


def test_clean_text() -> None:
    assert clean_text("a\x00b\r\n\tc\u202ed  e", 20) == "a b c d e"
    assert clean_text("x" * 30, 10) == "xxxxxxx..."
    assert clean_text("\ud800 lone", 20) == "lone"
    assert clean_text("\u00e9", 5, "ascii") == "?"


def test_numbers_and_durations() -> None:
    assert [format_number(value) for value in (None, float("nan"), 0.123456, 12345.6)] == [
        "-",
        "-",
        "0.1235",
        "1.235e+04",
    ]
    assert [format_seconds(value) for value in (None, 59.6, 3723.0)] == ["-", "0:01:00", "1:02:03"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_prints_text_and_nothing_else(encoding: str, terminal: bool) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = PlainConsole(file=stream)
    console._force_terminal, console.width = terminal, 200
    hostile = "a[/b] [red]c :x: \x1b[2J\x9b\u202ed\ud800 \u2603\u00e9"
    table = Table(hostile, title=hostile, caption=hostile)
    table.add_row(hostile)
    with console.status(hostile) as status:
        status.update(hostile)
        for each in (hostile, Text(hostile), table):
            console.print(each)
    text = raw.getvalue().decode(encoding)
    assert text.count("a[/b] [red]c :x:  [2J  d") >= 6
    assert not {"\x9b", "\u202e", "\ud800"} & set(text)
    assert "\x1b[2J" not in text
