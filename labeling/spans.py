"""Spans of responses that a chat model calls good or bad (DRLC's critic, offline) -> OUTPUT_DIR/spans.jsonl

python labeling/spans.py --responses answers.jsonl --model gpt-6-luna --output_dir OUTPUT

--responses: JSON lines with a prompt, and the response under "response" or "answer" (as step 3's --save_answers writes
them), or two of them under "chosen" and "rejected". Step 2 learns from the result: --spans OUTPUT/spans.jsonl. Exit
codes: those of labeling/main.py.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.asking.client import (
    EndpointOptions,
    agreed,
    ask_about_model,
    check_endpoint,
    discount,
    expected_effort,
    known_price,
    make_endpoint,
    resolve_model,
    run_all,
    signals_interrupt,
    warn_of_end,
)
from deepspeed_chat_tlcr.asking.endpoint import Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.models import EFFORTS, known_model
from deepspeed_chat_tlcr.asking.money import HIDDEN_TOKENS, Account, estimate_tokens, question_size
from deepspeed_chat_tlcr.asking.progress import Progress, Totals
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.marking import MAX_TOKENS, MOST_SPANS, load_template, question
from deepspeed_chat_tlcr.records import read_jsonl
from deepspeed_chat_tlcr.spans import content_id

EXIT_COMPLETE, EXIT_RESUMABLE = 0, 3
ANSWER_TOKENS = 80  # of a typical answer, for estimates


@dataclass(frozen=True, kw_only=True)
class Options(EndpointOptions):
    """Mark good and bad spans of responses with an external model (DRLC, Cao et al., 2024)."""

    responses: list[str] = option(MISSING, "JSON lines: prompt, and response or answer, or chosen and rejected")
    output_dir: str = option(MISSING, "folder for spans.jsonl, failures.jsonl, run.json; an earlier run continues")
    model: str | None = option(
        None, "the external model, such as gpt-6-luna; may be left out where --base_url is a server with one model"
    )
    reasoning_effort: str | None = option(
        "lowest", f"hidden reasoning before an answer: {', '.join(EFFORTS)}, or lowest, the least that the model has"
    )
    prompt_file: str | None = option(None, "a question of your own, with {prompt} and {response}")
    most_spans: int = option(MOST_SPANS, "most spans of each kind in a response", most=100)
    limit: int = option(0, "stop after so many responses, to look at them first; 0: all")


def read_responses(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(prompt, response) of every line. Raises ``InputError`` naming file, line and key."""
    for path in paths:
        for number, line in read_jsonl(path):
            keys = [key for key in ("response", "answer", "chosen", "rejected") if line.get(key) is not None]
            for key in ("prompt", *keys):
                if not isinstance(line.get(key), str):
                    raise InputError(f"{path}:{number}: {key!r} is missing or no text")
            if not keys:
                raise InputError(f"{path}:{number}: no 'response', 'answer', 'chosen' or 'rejected'")
            yield from ((line["prompt"], line[key]) for key in keys if line[key].strip())


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv)
    check_endpoint(options)
    model = resolve_model(options, options.model, "--model")
    try:
        with signals_interrupt():
            return mark(options, model)
    except KeyboardInterrupt:
        print("stopped before the first call or after the last; the same command continues", flush=True)
        return EXIT_RESUMABLE


def mark(options: Options, model: str) -> int:
    template = load_template(options.prompt_file, "--prompt_file")
    pool = {content_id(*texts): texts for texts in read_responses(options.responses)}
    if not pool:
        raise InputError(f"--responses {' '.join(options.responses)}: no responses in it")
    warn_of_end(known_model(model, options.prices), options.address)
    price = known_price(options, model)
    endpoint = make_endpoint(options, model, Sampling(MAX_TOKENS, reasoning_effort=options.reasoning_effort))
    settings = {"model": model, "prompt": template, "most": options.most_spans}
    settings |= {"reasoning_effort": options.reasoning_effort}
    with RunFolder(options.output_dir, "spans.jsonl", endpoint.redact) as folder:
        folder.bind(settings)
        state = folder.read_state()
        known = {id.decode() for id in state.results}
        failed = {id.decode() for id in state.failures}
        wanted = failed if options.retry_failed else pool.keys() - known - failed
        if options.retry_failed:
            state.attempts.clear()
        missing = [question(*texts, model, template, options.most_spans) for id, texts in pool.items() if id in wanted]
        missing = missing[: options.limit or None]
        tokens = ANSWER_TOKENS + HIDDEN_TOKENS.get(expected_effort(options, model) or "none", 0)
        expected = estimate_tokens(
            len(missing),
            sum(question_size(asked.messages) for asked in missing),
            len(missing) * tokens,
            price.discounted(discount(options, model)),
            *(options.concurrency, options.requests_per_minute, options.tokens_per_minute),
        )
        print(f"{len(pool)} responses, {len(missing)} to ask about, at {endpoint.shown_url}: {expected}", flush=True)
        if missing and not agreed(options, expected):
            return EXIT_RESUMABLE
        if missing:
            endpoint.dialect.context = ask_about_model(options, model, expected.hours, "--model")
        spent = (state.usd, state.usd_lost, discount(options, model), state.overrun)
        account = Account(price, options.max_cost_usd, *spent)
        about = {"responses": options.responses, "base_url": endpoint.shown_url}
        names = ("responses", "marked")
        totals = (len(pool), len(known), len(failed), state, state.usd, state.usd_lost, state.seconds, names)
        progress = Progress(folder, settings, about, Totals(*totals), account, len(missing))
        stopped: str | None = "refused by the endpoint"
        try:
            stopped = asyncio.run(run_all(options, endpoint, folder, account, state, missing, progress))
        except InputError as error:
            raise InputError(endpoint.redact(str(error))) from None
        finally:
            state = folder.read_state()
            done = len(state.results) + len(state.failures)
            complete = stopped is None and done == len(pool)
            counts = (len(pool), len(state.results), len(state.failures), state)
            totals = (*counts, state.usd, state.usd_lost, progress.seconds, names)
            folder.write_summary(Totals(*totals).summary(settings, about, complete, stopped))
        print(f"{folder.results}: {len(state.results)} marked, {len(state.failures)} failed, US$ {state.usd:.2f}")
        if not complete:
            print(f"stopped early ({stopped or '--limit'}); the same command continues", flush=True)
        return EXIT_COMPLETE if complete else EXIT_RESUMABLE


if __name__ == "__main__":
    sys.exit(main())
