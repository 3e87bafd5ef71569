"""Progress bars in a log. Ours and those of transformers and datasets are all tqdm's."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm.std import tqdm

SECONDS_BETWEEN_LINES, SHORTEST_SHOWN = 30.0, 1.0


def lines_instead_of_bars() -> None:
    """If stderr is not a terminal, print every bar as a whole line now and then, and once at its end.

    A bar redraws itself with carriage returns, which in a log would make one line of megabytes.
    """
    try:
        from tqdm.std import tqdm
    except ImportError:
        return  # the plan and the preflight work without packages and draw no bars
    if not sys.stderr.isatty():
        tqdm.display, tqdm.close, tqdm.clear = _display, _close, _clear


def _display(bar: "tqdm", msg: str | None = None, pos: int | None = None) -> None:
    now = time.monotonic()
    before = getattr(bar, "last_line_at", None)
    if before is None:
        bar.last_line_at = now  # nothing has been done yet
    elif now - before >= SECONDS_BETWEEN_LINES:
        _write(bar, now)


def _close(bar: "tqdm") -> None:
    if bar.disable:
        return
    bar.disable = True
    bar._decr_instances(bar)
    if bar.leave and bar._time() - bar.start_t >= SHORTEST_SHOWN:
        _write(bar, time.monotonic())


def _clear(bar: "tqdm", nolock: bool = False) -> None:
    """Nothing to clear: printed lines stay."""


def _write(bar: "tqdm", now: float) -> None:
    bar.last_line_at = now
    bar.fp.write(f"{bar.format_meter(**bar.format_dict | {'ncols': 100})}\n")
    bar.fp.flush()
