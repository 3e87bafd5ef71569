"""A chat model that marks spans of what the policy wrote, asked between a rollout and its reward (DRLC)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepspeed_chat_tlcr.asking.client import EndpointOptions, listed_price, make_endpoint
from deepspeed_chat_tlcr.asking.dispatch import Dispatcher, Limits
from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, ChatRequest, Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder, line_ids
from deepspeed_chat_tlcr.asking.models import Price, check_base_url
from deepspeed_chat_tlcr.asking.money import Account
from deepspeed_chat_tlcr.errors import InputError, describe_error
from deepspeed_chat_tlcr.marking import MAX_TOKENS, load_template, question
from deepspeed_chat_tlcr.records import parse_json, read_jsonl
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.spans import Marks, content_id, read_marked
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.texts import Answer


class SpanCritic:
    """Marks of answers, asked for by each rank for its own, and kept in OUTPUT/critic/rank-N: none is asked for twice.

    It never raises once the run has begun and never takes longer than ``--span_seconds`` for a set of rollouts: an
    answer that fails, cannot be read or comes late is no answer, and the other ranks hear nothing of it.
    """

    def __init__(self, model: str, options: Options, runtime: Runtime):
        """Raises ``InputError`` where the endpoint does not answer a first question, or the folder is another's."""
        self.model, self.options, self.rank = model, options, runtime.rank
        self.world_size = runtime.world_size
        self.template = load_template(options.span_prompt_file, "--span_prompt_file")
        asked = EndpointOptions(
            base_url=options.span_base_url, api_key_env=options.span_api_key_env, timeout=options.span_seconds
        )
        if asked.address:
            check_base_url(asked.address, "--span_base_url" if options.span_base_url else "OPENAI_BASE_URL")
        price = Price.parse(options.span_price, "--span_price") if options.span_price else listed_price(asked, model)
        if price is None:
            raise InputError(f"--reward critic:{model}: its price is not known; give it with --span_price IN,OUT")
        self.endpoint = make_endpoint(asked, model, Sampling(MAX_TOKENS, reasoning_effort="lowest"))
        path = Path(options.output_dir) / "critic" / f"rank-{runtime.rank}"
        self.folder = RunFolder(path, "spans.jsonl", self.endpoint.redact).__enter__()  # until the process ends
        self.state = self.folder.read_state()
        kept = read_marked(self.folder.results) if len(self.state.results) else ()
        self.marked = {line.id: line.marks for line in kept}
        cap = None if options.span_max_cost_usd is None else options.span_max_cost_usd / runtime.world_size
        self.account = Account(price, cap, self.state.usd, self.state.usd_lost, overrun=self.state.overrun)
        self.loop = asyncio.new_event_loop()  # one for all: connections live in it
        self.said = ""
        self.begin()
        self.settings = {"model": model, "prompt": self.template, "most": options.span_most}
        self.folder.bind(self.settings)
        self._try_out()

    def begin(self) -> None:
        """A new set of rollouts has the whole of ``--span_seconds``."""
        self.seconds = self.options.span_seconds

    @property
    def usd(self) -> float:
        """Spent by this rank in all starts of the run, calls without an answer at the most they may have cost."""
        return self.account.spent + self.account.lost

    def marks(self, answers: Sequence[Answer], wanted: Sequence[bool]) -> list[Marks | None]:
        """Of each answer that is wanted; None where it is not, or no usable reply came in time."""
        ids = [content_id(answer.prompt, answer.text) for answer in answers]
        settled = self.marked.keys() | {id.decode() for id in line_ids(self.folder.failures)}
        missing = {
            id: self._question(answer.prompt, answer.text)
            for id, answer, want in zip(ids, answers, wanted, strict=True)
            if want and id not in settled
        }
        if missing and self.seconds > 0:
            self._say(self._ask(missing))
        return [self.marked.get(id) if want else None for id, want in zip(ids, wanted, strict=True)]

    def _question(self, prompt: str, response: str) -> ChatRequest:
        asked = question(prompt, response, self.model, self.template, self.options.span_most)

        def accept(answer: ChatAnswer, usage: dict) -> str:
            line = asked.accept(answer, usage)
            read = parse_json(line)
            self.marked[asked.id] = Marks(tuple(read["positive"]), tuple(read["negative"]))
            return line

        return replace(asked, accept=accept)

    def _try_out(self) -> None:
        """One question before any model is loaded, so that a wrong key, name or address is told at once."""
        if self.marked:
            return
        first, reason = self._question("How far is the moon?", "About 384,000 km."), None
        try:
            reason = self.loop.run_until_complete(self._asked({first.id: first}))
        finally:
            if not self.marked:  # nothing is lost, and the mended command may be another
                failures = [line for _, line in read_jsonl(self.folder.failures)]
                self.folder.failures.unlink()
                self.folder.summary.unlink()
        if not self.marked:
            reason = reason or ", ".join(failure["reason"] for failure in failures)
            raise InputError(
                f"--reward critic:{self.model}: {self.endpoint.shown_url} gave no usable answer to a first question "
                f"({reason}; --span_seconds {self.options.span_seconds:g})"
            )

    def _ask(self, requests: Mapping[str, ChatRequest]) -> str | None:
        """What kept some of them from an answer; None where nothing did."""
        begun = self.loop.time()
        try:
            reason = self.loop.run_until_complete(self._asked(requests))
            summary = {"settings": self.settings, "complete": False, "marked": len(self.marked)}
            spent = {"usd": round(self.account.spent, 6), "usd_possibly_billed_without_answer": self.account.lost}
            self.folder.write_summary(summary | spent)
            return reason
        except Exception as error:  # whatever it is: this rank must be back in time for the next collective
            return self.endpoint.redact(str(error) if isinstance(error, InputError) else describe_error(error))
        finally:
            self.seconds -= self.loop.time() - begun

    async def _asked(self, requests: Mapping[str, ChatRequest]) -> str | None:
        limits = Limits(self.options.span_concurrency, attempts=1, max_retries=3)
        dispatcher = Dispatcher(self.endpoint, self.folder, self.account, limits, self.state)
        if self.endpoint.answered:  # nothing is left to learn from a first request that goes alone
            dispatcher.let_loose.set()
        self.folder.open_files()
        try:
            return await dispatcher.run(requests.values(), seconds=self.seconds)
        finally:
            await self.folder.close_files()
            self.account.settle(self.account.held, lost=self.account.held)  # calls given up may be billed

    def _say(self, reason: str | None) -> None:
        """Once for each reason in a row."""
        if (reason or "") != self.said:
            self.said = reason or ""
            print(f"rank {self.rank}: critic: {reason or 'answers again'}", flush=True)
