"""What ranks share and what each has for itself: cores, random numbers, the average's parts; refusals before a run."""

import pytest
import torch
from transformers import AutoModelForTokenClassification

import step2_discriminator.main
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_token_classifier, require_attention
from deepspeed_chat_tlcr.optim import add_lora
from deepspeed_chat_tlcr.runtime import heartbeat, share_of_cores
from step3_ppo_tlcr import ema
from step3_ppo_tlcr.averages import Averages


def test_each_rank_has_its_own_cores_with_all_their_threads():
    # Two sockets of two cores, which show two processors each: 0-3 are the cores, 4-7 their second threads.
    def core_of(processor):
        return str(processor % 4)

    assert share_of_cores(range(8), core_of, 0, 2) == [(0, 4), (1, 5)]
    assert share_of_cores(range(8), core_of, 1, 2) == [(2, 6), (3, 7)]
    # More ranks than cores: one each.
    assert [share_of_cores([0, 1], str, rank, 4) for rank in range(4)] == [[(0,)], [(0,)], [(1,)], [(1,)]]


def test_averages_take_numbers_of_any_kind_and_device(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    averages = Averages(torch.device("cpu"))
    averages.add("a", torch.tensor([1.0, 5.0], dtype=torch.bfloat16), torch.tensor([1, 0]))
    averages.add("a", torch.tensor([3]))
    assert averages.reduce() == {"a": 2.0}


def test_a_long_save_says_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    said = []
    monkeypatch.setattr("builtins.print", lambda text, **kwargs: said.append(text))
    with heartbeat("saving", every=0.01):
        while not said:
            pass
    assert said[0].startswith("still saving, 0.0 min")


def test_every_rank_keeps_its_part_of_the_average(monkeypatch):
    """Two ranks and a weight of 5 numbers: 3 and 2 of them; what is put in place is whole again."""
    weight = torch.nn.Parameter(torch.arange(5.0))
    parts = {}

    class Engine:
        module = torch.nn.ParameterDict({"w": weight})

    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        parts[rank] = ema.WeightAverage(Engine, decay=0.5)
    assert [parts[rank].averages["w"].tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4]]
    weight.data += 2
    for average in parts.values():
        average.update()
    assert parts[1].averages["w"].tolist() == [4, 5]

    def gather(whole, part):  # both ranks have as many, the last one's end is padding
        whole.copy_(torch.cat([parts[0].averages["w"], parts[1].averages["w"], torch.zeros(1)]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    parts[0]._put(parts[0].averages)
    assert weight.tolist() == [1, 2, 3, 4, 5]


def test_a_new_discriminator_begins_undecided(tiny, tmp_path, in_process):
    """D = 0.5 on every token: the first loss is log 2, whatever the backbone's states."""
    in_process(
        step2_discriminator.main.main,
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path),
        *("--revisions", tiny / "revisions.jsonl", "--per_device_train_batch_size", 4, "--dtype", "fp32"),
    )
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).score.weight.count_nonzero() > 0


def test_lora_finds_the_blocks_and_scales_as_peft_does(tiny):
    model = load_token_classifier(str(tiny / "model"), 2, torch.float32, new_head=True)
    add_lora(model, 4, 8.0, "auto", only_lora=True)
    names = {name for name, module in model.named_modules() if isinstance(getattr(module, "scaling", None), dict)}
    assert len(names) == 2 * 7  # q, k, v, o, gate, up and down of two blocks
    assert all(name.startswith("model.layers.") for name in names)
    assert {model.get_submodule(name).scaling["default"] for name in names} == {2.0}


@pytest.mark.parametrize(
    ("name", "words"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "FlashAttention 3")]
)
def test_attention_that_is_not_installed_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        require_attention(name, "bf16")
    require_attention("sdpa", "fp32")
    require_attention("eager", "fp32")
