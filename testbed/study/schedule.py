"""Steps run side by side, each in a fork of this process, as soon as what they need is there."""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from deepspeed_chat_tlcr.errors import InputError
from testbed.study import forked
from testbed.study.artefacts import Step, Store, in_order

LOG = "study.log"


class Clock:
    """When no further step may begin: ``seconds`` from now on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end


@dataclass
class Outcome:
    """What became of the steps that were wanted."""

    done: int = 0
    failed: dict[Step, int] = field(default_factory=dict)  # exit status; not those that could not begin for want of it
    skipped: int = 0


def run(store: Store, wanted: Sequence[Step], jobs: int, title: str, clock: Clock | None = None) -> Outcome:
    """Make ``wanted`` and all that they need, ``jobs`` at a time; what is done is not made again.

    A step that fails keeps the others from nothing but what needs it: the caller says which ones did. An interrupt
    ends the running steps; they begin anew at the next call. Once ``clock`` is over none begins.
    """
    steps = in_order(wanted)
    left = [step for step in steps if not store.is_done(step)]
    outcome = Outcome(done=len(steps) - len(left))
    running: dict[int, tuple[Step, float]] = {}
    if left:
        forked.warm_up()
    before = signal.signal(signal.SIGTERM, _interrupt)
    with tqdm(total=len(steps), initial=outcome.done, desc=title, dynamic_ncols=True) as bar:
        try:
            while left or running:
                left = [] if clock and clock.is_over else _begin(store, left, jobs, running, outcome)
                if not running:
                    break
                process, status = os.wait()
                step, begun = running.pop(process)
                _end(store, step, os.waitstatus_to_exitcode(status), time.monotonic() - begun, outcome)
                bar.update()
                bar.set_postfix_str(step.name)
        except BaseException:
            for process in running:
                os.kill(process, signal.SIGTERM)
            for process in running:
                os.waitpid(process, 0)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return outcome


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _begin(store: Store, left: list[Step], jobs: int, running: dict, outcome: Outcome) -> list[Step]:
    """Start what can be started; returns what is still left."""
    waiting = []
    for step in left:
        if any(needed in outcome.failed for needed in in_order(step.needs)):
            outcome.skipped += 1
        elif len(running) < jobs and all(map(store.is_done, step.needs)):
            folder = store.folder(step)
            # Anew, not from a checkpoint of a run that was ended: its rollouts would not be those of all updates.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            process = forked.start(step.program, store.arguments(step), folder / LOG, dict(step.variables))
            running[process] = (step, time.monotonic())
        else:
            waiting.append(step)
    return waiting


def _end(store: Store, step: Step, status: int, seconds: float, outcome: Outcome) -> None:
    # A stage that was told to end saves its state and exits with 0, but has no results.
    if status == 0 and (store.folder(step) / "results.json").is_file():
        store.mark_done(step, round(seconds, 1))
        outcome.done += 1
        return
    outcome.failed[step] = status
    tail = (store.folder(step) / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    tqdm.write(f"{step.name} ended with status {status}: {' '.join(tail)} ({store.folder(step) / LOG})")


def require(outcome: Outcome, store: Store) -> None:
    """Raise ``InputError`` that names every step that failed."""
    if outcome.failed:
        names = ", ".join(f"{step.name} ({store.folder(step) / LOG})" for step in outcome.failed)
        raise InputError(
            f"{len(outcome.failed)} steps failed and {outcome.skipped} could not begin: {names}; mend the cause and "
            "start the same command again, it continues"
        )
