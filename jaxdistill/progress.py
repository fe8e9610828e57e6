"""Progress that people look at: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


@contextlib.contextmanager
def bar(label: str, total: int, *, done: int = 0, every_s: float = 10.0) -> Iterator[Callable[[int, str], None]]:
    """Gives `update(done, note)`: `done` of `total` so far, and a short note such as `5,120 tokens/s`."""
    if console.is_terminal:
        columns = (
            TextColumn(f"  {label:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=done, note="")
            yield lambda now, note="": progress.update(task, completed=now, note=note)
        return

    last = time.monotonic()

    def update(now: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            console.print(f"  {label}: {now:,} of {total:,}{'; ' + note if note else ''}")

    yield update


def say(text: str = "") -> None:
    """Prints one line for people, above a progress bar if there is one."""
    console.print(text, markup=False)
