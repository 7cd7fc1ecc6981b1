"""What training shows while it runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "duration"]

BAR_SECONDS = 0.2  #: between updates of the bar, since reading figures waits for the device
LINE_SECONDS = 60.0  #: between plain lines


def duration(seconds: float) -> str:
    """``"45 s"``, ``"12 min"`` or ``"3.4 h"``."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Progress:
    """Context manager around the training loop; :meth:`update` after each step is cheap."""

    def __init__(self, console: Console, total: int, done: int):
        self.console = console
        self.total = total
        self.shown = time.monotonic()
        self.began, self.began_at = time.monotonic(), done
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, epoch=0, figures="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, epoch: int, figures: Callable[[], str]) -> None:
        """Show that ``step`` steps are done; ``figures`` is called only when something is shown."""
        now = time.monotonic()
        if now - self.shown < (BAR_SECONDS if self.console.is_terminal else LINE_SECONDS):
            return
        self.shown = now
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, epoch=epoch, figures=figures())
            return
        left = (now - self.began) / (step - self.began_at) * (self.total - step)
        self.print(f"epoch {epoch}, step {step}/{self.total}: {figures()}, {duration(left)} to go")

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
