"""Pre-training text mixed into PPO (``--unsupervised_dataset_name``; InstructGPT, equation 2)."""

import os

import torch
from datasets import load_dataset
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Decoding
from step3_ppo_tlcr.logprobs import token_logprobs
from step3_ppo_tlcr.options import Options

_FILES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_blocks(options: Options, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The data set's ``text`` column, joined and cut into blocks as long as a prompt and its answer, ``(N, T)``.

    Raises ``InputError`` for a data set that cannot be had, has no such column or does not fill one block.
    """
    name = options.unsupervised_dataset_name
    kind = _FILES.get(os.path.splitext(name)[1])
    try:
        if kind and os.path.isfile(name):
            data = load_dataset(kind, data_files=name, split="train")
        else:
            data = load_dataset(name, options.unsupervised_dataset_config_name, split="train")
    except (OSError, ValueError) as error:
        raise InputError(f"--unsupervised_dataset_name {name}: {str(error).splitlines()[0]}") from None
    if "text" not in data.column_names:
        raise InputError(f"--unsupervised_dataset_name {name}: no 'text' column among {', '.join(data.column_names)}")
    length = options.max_prompt_seq_len + options.max_answer_seq_len
    ids: list[int] = []
    for batch in data.select_columns("text").iter(batch_size=1000):
        for row in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
    if len(ids) < length:
        raise InputError(f"--unsupervised_dataset_name {name}: {len(ids)} tokens do not fill one block of {length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Pretraining:
    """Batches of blocks in a seeded order, another in each pass, and the loss on them."""

    def __init__(self, blocks: torch.Tensor, options: Options, rank: int, world_size: int):
        self.blocks, self.size, self.seed = blocks, options.per_device_training_batch_size, options.seed
        self.rank, self.world_size = rank, world_size
        self.position = 0  # batches so far; resumable

    def batch(self) -> torch.Tensor:
        """This rank's next blocks, ``(B, T)``."""
        first = (self.position * self.world_size + self.rank) * self.size
        self.position += 1
        return torch.stack([self._block(first + row) for row in range(self.size)])

    def _block(self, index: int) -> torch.Tensor:
        epoch, place = divmod(index, len(self.blocks))
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.blocks[order[place]]

    def loss(self, engine: DeepSpeedEngine) -> torch.Tensor:
        """Mean negative log-likelihood per token of the next blocks, in nats."""
        ids = self.batch().to(engine.device)
        logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        return -token_logprobs(logits, ids[:, 1:], Decoding(0), eos_id=-1).mean()
