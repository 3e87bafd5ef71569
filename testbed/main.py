"""The testbed's command line: ``python testbed/main.py data|base|serve …`` (each with ``--help``)."""

import json
import random
import signal
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.arguments import option, parse, run_command, seed_option
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.records import write_jsonl
from testbed.serve import MODEL, make_server
from testbed.world import WORLDS, World, distinct_prompts


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """world"""

    world: Literal[1, 2] = option(2, "which kind of world (docs/testbed.md); 1: the old one")
    world_seed: int = seed_option(0, "which facts hold: every seed is a fresh world in the same language")

    def made(self, **rates: float) -> World:
        return WORLDS[self.world](seed=self.world_seed, **rates)


@dataclass(frozen=True, kw_only=True)
class DataOptions(WorldOptions):
    """Write pairs, train.jsonl and eval.jsonl, and prompts to choose settings on and to report on,
    validation_prompts.jsonl and test_prompts.jsonl; no prompt stands twice."""

    output_dir: str = option(MISSING, "folder for the files")
    train: int = option(12800, "training pairs, for SFT, reward and RL together")
    eval: int = option(1024, "evaluation pairs")
    validation: int = option(256, "validation prompts")
    test: int = option(512, "test prompts, in world 2 a third each: new, about new facts, in new phrasings")
    data_seed: int = seed_option(1234, "seed of prompts, answers and preferences")
    preference_sharpness: float = option(World.preference_sharpness, "Bradley-Terry: P = sigmoid(this x score gap)")


@dataclass(frozen=True, kw_only=True)
class BaseOptions(WorldOptions):
    """Train the base model from scratch on the world's raw text, on CPU; write a Hugging Face folder."""

    output_dir: str = option(MISSING, "folder for tokenizer, model and results.json")
    documents: int = option(12000, "documents of raw text, about 42 tokens each", most=10**7)
    hidden_size: int = option(192, "width of the model, of four heads", least=16, most=4096, multiple=8)
    layers: int = option(2, "layers of the model", most=100)
    learning_rate: float = option(3e-3, "peak learning rate")
    seed: int = seed_option(1234, "seed of text and initialisation")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(WorldOptions):
    """Serve the oracle reviser as an OpenAI-compatible endpoint until interrupted or terminated."""

    host: str = option("127.0.0.1", "address to listen at")
    port: int = option(0, "port to listen at; 0: any free one", most=65_535)
    port_file: str | None = option(None, "file to write the port to once the server listens")
    model: str = option(MODEL, "name of the model to answer as")
    revision_noise: float = option(World.revision_noise, "chance that a choice is edited wrongly", most=1)


def write_data(argv: list[str]) -> None:
    options = parse(DataOptions, argv)
    world = options.made(preference_sharpness=options.preference_sharpness)
    folder = Path(options.output_dir)
    rng, seen = random.Random(f"pairs {options.data_seed}"), set()
    prompts = distinct_prompts(world, rng, seen)
    for name, count in (("train", options.train), ("eval", options.eval)):
        pairs = (world.sample_pair(next(prompts), rng) for _ in range(count))
        write_jsonl(folder / f"{name}.jsonl", (pair.as_pair() for pair in pairs))
    validation = ({"prompt": next(prompts)} for _ in range(options.validation))
    counts = {"train": options.train, "eval": options.eval}
    counts["validation"] = write_jsonl(folder / "validation_prompts.jsonl", validation)
    kinds = [(kind, distinct_prompts(world, rng, seen, kind)) for kind in world.kinds]
    test = (kinds[at * len(kinds) // options.test] for at in range(options.test))
    told = ({"prompt": next(made), "kind": kind} for kind, made in test)
    counts["test"] = write_jsonl(folder / "test_prompts.jsonl", told)
    write_jsonl(folder / "results.json", [counts])


def train_base(argv: list[str]) -> None:
    options = parse(BaseOptions, argv)
    from testbed import base  # torch and transformers take seconds to import; the other commands do without

    config = base.BaseConfig(**{name: getattr(options, name) for name in base.ASKED})
    print(json.dumps(base.train_base(options.made(), config, Path(options.output_dir))))


def serve(argv: list[str]) -> None:
    options = parse(ServeOptions, argv)
    world = options.made(revision_noise=options.revision_noise)
    try:
        server = make_server(world, options.host, options.port, options.model)
    except OSError as error:
        raise InputError(
            f"--host {options.host} --port {options.port}: cannot listen there ({error.strerror})"
        ) from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with server:
        print(f"serving {options.model} at http://{options.host}:{server.server_port}/v1", flush=True)
        if options.port_file:
            part = Path(options.port_file + ".part")
            part.write_text(f"{server.server_port}\n")
            part.replace(options.port_file)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


COMMANDS = {"data": write_data, "base": train_base, "serve": serve}


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    main()
