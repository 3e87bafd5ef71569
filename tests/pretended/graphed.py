"""Decoding by graphs beside the plain loop, on the pretended device: prints a JSON line for each model."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu

gpu.install()
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from deepspeed_chat_tlcr.decode import decode
from deepspeed_chat_tlcr.generation import Decoding, left_pad
from deepspeed_chat_tlcr.graphs import GraphedLoop

EOS, PAD = 3, 0
SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "head_dim": 8}
SIZES |= {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 1}
FAMILIES = {
    "llama": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
}
DECODINGS = [Decoding(140, 0.0), Decoding(140, min_new_tokens=9), Decoding(140, 0.7, top_p=0.8, top_k=9)]


def model_of(family: str):
    set_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1 if family == "opt" else 0.4)
    return model.eval().to("cuda")


def main() -> None:
    for family in sys.argv[1:]:
        model, said = model_of(family), []
        graphs = GraphedLoop(said.append)
        same = []
        for decoding in DECODINGS:
            prompts = [torch.randint(4, 24, (n,)).tolist() for n in (3, 17, 9, 30, 5)]
            ids, mask = (part.to("cuda") for part in left_pad(prompts, PAD))
            written = []
            for by in (decode, graphs.decode):
                set_seed(5)
                written.append(by(model, ids, mask.clone(), decoding, EOS, PAD))
            same.append(torch.equal(*written))
        used = []
        for tokens in (24, 48):  # both once before they are counted: then the graphs are there
            graphs.decode(model, ids, mask, Decoding(tokens, min_new_tokens=tokens), EOS, PAD)
            before = gpu.counts()
            graphs.decode(model, ids, mask, Decoding(tokens, min_new_tokens=tokens), EOS, PAD)
            used.append(gpu.counted_since(before))
        more = {kind: sum(used[1][kind].values()) - sum(used[0][kind].values()) for kind in ("launches", "waits")}
        print(json.dumps({"family": family, "same": same, "said": said, **{k: n / 24 for k, n in more.items()}}))


if __name__ == "__main__":
    main()
