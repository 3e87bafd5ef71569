"""A tokenizer and an untrained Llama for a world that brings no base model -> OUTPUT_DIR"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.records import read_jsonl
from deepspeed_chat_tlcr.saving import write_json
from evaluation.qa_feedback import untrained_llama
from testbed.base import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a tokenizer, one token a word, and a Llama with random weights."""

    texts: str = option(MISSING, "the folder texts/ of the parts")
    hidden_size: int = option(192, "width of the Llama; a head for every 32", least=32, most=4096, multiple=32)
    layers: int = option(2, "layers of the Llama", most=100)
    max_positions: int = option(512, "longest text that the Llama can read, tokens")
    seed: int = seed_option(1234, "seed of the weights")
    output_dir: str = option(MISSING, "folder for tokenizer and model")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    records = [record for _, record in read_jsonl(Path(options.texts) / "train.jsonl")]
    tokenizer = build_tokenizer([record["prompt"] + record["chosen"] for record in records])
    sizes = (options.hidden_size, options.layers, options.max_positions)
    model = untrained_llama(tokenizer, *sizes, options.seed)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    counts = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
    write_json(Path(options.output_dir) / "results.json", counts)
