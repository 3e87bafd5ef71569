"""Revisions of a study's reward part -> OUTPUT_DIR/{train,eval}.jsonl

By the testbed's reviser, behind an OpenAI-compatible endpoint and asked by labeling/main.py as GPT-4 would be; or taken
from a file (--revisions), where the world has another reviser.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.records import Revision, read_jsonl, read_revisions, write_jsonl
from deepspeed_chat_tlcr.saving import write_json
from labeling.main import main as label
from testbed.serve import MODEL, serve_in_thread
from testbed.world import WORLDS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Revise the rejected responses of a study's reward part."""

    data_path: str = option(MISSING, "the folder reward/ of the parts")
    revisions: str | None = option(None, "revisions.jsonl of another reviser; unset: the testbed's reviser is asked")
    world: Literal[1, 2] = option(2, "which of the testbed's worlds")
    world_seed: int = seed_option(0, "the testbed world whose truth the reviser knows")
    output_dir: str = option(MISSING, "folder for the revisions")


def ask(options: Options, split: str) -> list[Revision]:
    """The testbed's revisions of one split, in the order of the data."""
    folder = Path(options.output_dir) / f"labeling-{split}"
    server = serve_in_thread(WORLDS[options.world](seed=options.world_seed))
    try:
        address = f"http://127.0.0.1:{server.server_port}/v1"
        status = label(
            [
                *("--data_path", options.data_path, "--data_split", "0,10,0", "--split", split),
                *("--model", MODEL, "--base_url", address, "--output_dir", str(folder), "--concurrency", "8", "--yes"),
            ]
        )
    finally:
        server.shutdown()
        server.server_close()
    if status:
        raise InputError(f"{folder}: labelling ended with status {status}")
    found = read_revisions(folder / "revisions.jsonl")
    # Answers arrive in any order; by id, the same pairs are kept whatever that order was.
    return sorted(found, key=lambda revision: revision.id)


def imported(options: Options, split: str) -> list[Revision]:
    """The revisions of --revisions whose prompts belong to one split."""
    prompts = {record["prompt"] for _, record in read_jsonl(Path(options.data_path) / f"{split}.jsonl")}
    found = [revision for revision in read_revisions(options.revisions) if revision.prompt in prompts]
    if not found:
        raise InputError(f"{options.revisions}: no revision of a prompt of the {split} split of the reward part")
    return found


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    find = imported if options.revisions else ask
    counts = {}
    for split in ("train", "eval"):
        counts[split] = write_jsonl(Path(options.output_dir) / f"{split}.jsonl", map(asdict, find(options, split)))
    write_json(Path(options.output_dir) / "results.json", counts)
