"""For gpu.sh: a Llama of random weights with its tokenizer, preference data and revisions; or a run's figures.

python benchmarks/gpu_inputs.py FOLDER full|tiny; python benchmarks/gpu_inputs.py --figures RUN;
python benchmarks/gpu_inputs.py --machine: the card and the versions
"""

import json
import random
import sys
from pathlib import Path

SHAPES = {  # hidden size, layers, heads, MLP's width, words, records
    "full": (2048, 24, 16, 5504, 31_997, 1200),
    "tiny": (64, 2, 2, 128, 200, 120),
}
SHOWN = ("seconds/rollout", "seconds/score", "seconds/train", "memory/peak_gib", "policy/kl")


def make(folder: Path, size: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, width, count, records = SHAPES[size]
    words = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(count))]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=width,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(words[3:]) for _ in range(length))

    with (folder / "data.jsonl").open("w") as data, (folder / "revisions.jsonl").open("w") as revisions:
        for number in range(records):
            prompt, rejected = text(rng.randint(20, 200 if size == "full" else 40)), " " + text(40)
            record = {"prompt": prompt, "chosen": " " + text(40), "rejected": rejected}
            data.write(json.dumps(record) + "\n")
            modified = " ".join(word if rng.random() < 0.9 else rng.choice(words[3:]) for word in rejected.split(" "))
            more = {"id": f"r{number}", "modified": modified, "reasoning": "", "model": "made", "usage": {}}
            revisions.write(json.dumps(record | more) + "\n")


def figures(run: Path) -> str:
    """The last update's times, memory and KL, where a run has them."""
    results = json.loads((run / "results.json").read_text())
    return "  ".join(f"{name} {results[name]:.3g}" for name in SHOWN if name in results)


def machine() -> str:
    """The card and the versions; fails where there is no card."""
    import deepspeed
    import torch
    import transformers

    versions = (f"{package.__name__} {package.__version__}" for package in (torch, deepspeed, transformers))
    return ", ".join([torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", *versions])


if __name__ == "__main__":
    if sys.argv[1] == "--machine":
        print(machine())
    elif sys.argv[1] == "--figures":
        print(figures(Path(sys.argv[2])))
    else:
        make(Path(sys.argv[1]), sys.argv[2])
