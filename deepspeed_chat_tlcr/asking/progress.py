"""What a run shows while it works, and what it writes into run.json."""

import sys
import time
from dataclasses import dataclass, replace

from tqdm import tqdm

from deepspeed_chat_tlcr.asking.journal import RunFolder, State
from deepspeed_chat_tlcr.asking.money import Account

WRITE_EVERY = 10.0  # seconds between two writings of run.json


@dataclass
class Totals:
    """The counts in run.json, over all runs in the folder."""

    pairs: int
    revisions: int
    failures: int
    state: State
    usd: float | None
    usd_lost: float
    seconds: float
    names: tuple[str, str] = ("pairs", "revisions")  # the questions, the results

    def summary(self, settings: dict, about: dict, complete: bool, stopped: str | None) -> dict:
        return {
            "settings": settings,
            "complete": complete,
            "stopped": stopped,
            **about,
            "counts": {
                self.names[0]: self.pairs,
                self.names[1]: self.revisions,
                "failures": self.failures,
                "unusable_answers": dict(sorted(self.state.unusable.items())),
                "calls_without_answer": dict(sorted(self.state.faults.items())),
            },
            "tokens": {
                "prompt": self.state.prompt_tokens,
                "completion": self.state.completion_tokens,
                "of_which_reasoning": self.state.reasoning_tokens,
            },
            "usd": None if self.usd is None else round(self.usd, 6),
            "usd_possibly_billed_without_answer": round(self.usd_lost, 6),
            "seconds": round(self.seconds, 1),
        }


class Progress:
    """The progress bar, and run.json kept up to date. ``totals``: the counts when this run starts."""

    def __init__(self, folder: RunFolder, settings: dict, about: dict, totals: Totals, account: Account, todo: int):
        self.folder, self.settings, self.about, self.totals, self.account = folder, settings, about, totals, account
        self.todo = todo
        self.started = self.written = time.monotonic()
        on_terminal = sys.stderr.isatty()
        unit, what = totals.names
        self.bar = tqdm(total=todo, unit=f" {unit}", desc=what, mininterval=0.5 if on_terminal else 15.0)

    @property
    def seconds(self) -> float:
        return self.totals.seconds + time.monotonic() - self.started

    def show(self, run):
        """After each outcome; ``run`` counts ``accepted`` and ``failed``."""
        done, state, now = run.accepted + run.failed, self.totals.state, time.time()
        if done == self.todo or now - self.bar.last_print_t > self.bar.mininterval:
            notes = {}
            if self.account.price:
                before, new = self.totals.usd or 0.0, self.account.spent
                notes["US$"] = f"{new:.2f} of about {before + (new - before) * self.todo / max(done, 1):.2f}"
            if state.reasoning_tokens:
                notes["tokens of hidden reasoning"] = state.reasoning_tokens
            notes |= {"failed": run.failed} if run.failed else {}
            notes |= dict((state.unusable + state.faults).most_common(3))
            self.bar.set_postfix(notes, refresh=False)
        self.bar.update(done - self.bar.n)
        if time.monotonic() - self.written > WRITE_EVERY:
            self.written = time.monotonic()
            totals = replace(
                self.totals,
                revisions=self.totals.revisions + run.accepted,
                failures=self.totals.failures + run.failed,
                usd=self.account.spent if self.account.price else None,
                usd_lost=self.account.lost,
                seconds=self.seconds,
            )
            self.folder.write_summary(totals.summary(self.settings, self.about, complete=False, stopped=None))

    def close(self):
        self.bar.close()
