"""The end of a turn, for chat templates of several families: from messages to labels, rollouts and saved models."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama, write_jsonl
from labeling_helpers import fault_server, label
from tokenizers import processors
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import step2_discriminator.main
import step3_ppo_tlcr.main
from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.generation import Decoding, answers, response_mask, warp
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_causal_lm
from deepspeed_chat_tlcr.records import Preference, Revision, read_jsonl, read_revisions
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_response
from deepspeed_chat_tlcr.turns import end_after, end_ids, render
from labeling.own_answers import main as own_answers
from labeling.prompt import build_messages, context_of, framed_as
from labeling.token_labels import label_revision


@dataclass(frozen=True)
class Family:
    """A chat template, the tokens it is made of, and what its texts look like."""

    template: str
    eos: str
    end: str  # behind an assistant's turn
    tokens: tuple[str, ...]
    prompt: str  # of "Hi" after the system's "Be kind."


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        *("<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        *("<eos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
        "<start_of_turn>system\nBe kind.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        *("<|endoftext|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
    ),
    "llama 3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'system' %}Today Date: {{ strftime_now('%d %b %Y') }}\n\n{% endif %}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        *("<|end_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr, ends in EOS": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        *("</s>", "</s>", ()),
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    ),
    "ends in plain words": Family(
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
        *("</s>", "</s>", ()),
        "### system\nBe kind.\n### end\n### user\nHi\n### end\n### assistant\n",
    ),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Adds BOS by itself, as Gemma's and Llama's do."""
    inner = byte_level_tokenizer(["Hi there, you are a good or a bad one."] * 3)._tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=family.eos, additional_special_tokens=list(family.tokens)
    )
    tokenizer.chat_template = family.template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
RECORD = {"prompt": MESSAGES, "chosen": "A good one.", "rejected": "A bad one."}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_family
def test_a_response_ends_where_its_words_do_and_its_end_is_a_neutral_token(family, tmp_path):
    tokenizer = tokenizer_of(family)
    path = write_jsonl(tmp_path / "chats.jsonl", [RECORD])
    found = load_preferences(str(path), "all", "train", tokenizer=tokenizer)[0]
    assert (found.prompt, found.chosen, found.rejected) == (family.prompt, "A good one.", "A bad one.")
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert end_after(tokenizer, found.prompt) == end
    rejected, modified = label_revision(
        tokenizer, Revision(found.id, found.prompt, found.chosen, found.rejected, "A good one.", "", "m", {}), 999
    )
    for example, label_of_edit in ((rejected, 0.0), (modified, 1.0)):
        assert example.response_ids[-1] == end
        assert example.response_ids.count(end) == 1
        assert example.targets[-1] == 0.5
        assert set(example.targets) == {0.5, label_of_edit}
    edited = [id for id, target in zip(rejected.response_ids, rejected.targets, strict=True) if target == 0.0]
    assert set(tokenizer.decode(edited)) <= set(" bad")
    # Trained on and rolled out alike: these ids begin as the template's own do.
    whole = tokenizer(render(tokenizer, [*MESSAGES, {"role": "assistant", "content": "A bad one."}]))["input_ids"]
    doubled = whole[:2] == [tokenizer.bos_token_id] * 2  # the template writes BOS, and this tokenizer another
    words = rejected.input_ids[: -1 if family.end == family.eos else None]
    assert words == whole[doubled:][: len(words)]


@each_family
def test_the_external_model_sees_turns_whatever_the_template(family, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [RECORD])
    found = load_preferences(str(path), "all", "train", tokenizer=tokenizer_of(family))[0]
    text = build_messages(found)[0]["content"]
    assert "<|Start of Context|>\n###System: Be kind.\n###Human: Hi\n<|End of Context|>" in text
    assert "<|Start of Non-Preferred Response|>\nA bad one.\n<|End of Non-Preferred Response|>" in text
    assert family.end not in text


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi", "zephyr, ends in EOS"])
def test_text_that_a_template_has_rendered_before_is_shown_as_turns_too(name):
    turns = "###System: Be kind.\n###Human: Hi"
    assert context_of(FAMILIES[name].prompt) == turns
    assert context_of("<s>" + FAMILIES[name].prompt) == turns


def test_turns_of_the_release_s_own_template():
    prompt = "[INST] Hi</s>[/INST] Hello</s>[INST] Who?</s>[/INST]"  # Dahoas/template-full-hh-rlhf
    assert context_of(prompt) == "###Human: Hi\n###Assistant: Hello\n###Human: Who?"


def test_prompts_that_no_template_wrote_end_in_eos():
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    example = tokenize_response(tokenizer, "\n\nHuman: Hi\n\nAssistant:", " Hello")
    assert example.input_ids[-1] == tokenizer.eos_token_id
    written = tokenize_response(tokenizer, FAMILIES["chatml"].prompt, "Hello<|im_end|>")
    assert written == tokenize_response(tokenizer, FAMILIES["chatml"].prompt, "Hello")  # never two ends


def test_ends_are_those_of_tokenizer_template_and_generation_config(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    eos, start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    assert end_ids(tokenizer) == (eos, end)
    tokenizer.save_pretrained(tmp_path)
    word = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    GenerationConfig(eos_token_id=[end, start, word]).save_pretrained(tmp_path)
    assert end_ids(AutoTokenizer.from_pretrained(tmp_path)) == (eos, end, start, word)
    GenerationConfig.from_model_config(LlamaConfig(eos_token_id=[word, start])).save_pretrained(tmp_path)
    assert end_ids(AutoTokenizer.from_pretrained(tmp_path)) == (eos, end, start)  # a config's default may be any word
    tokenizer.chat_template = None
    assert end_ids(tokenizer) == (eos,)


def test_a_thinking_template_s_empty_thoughts_are_neither_shown_nor_edited():
    thoughts = "<think>\n\n</think>\n\n"
    text = build_messages(Preference("p", f"{thoughts}Good.", f"{thoughts}Bad."))[0]["content"]
    assert "think>" not in text
    assert "<|Start of Non-Preferred Response|>\nBad.\n<|End of Non-Preferred Response|>" in text
    assert framed_as(f"{thoughts}Bad.", "Good.") == f"{thoughts}Good."


def test_every_end_stops_a_row_and_none_comes_too_early():
    ids = torch.tensor([[5, 3, 6, 2], [5, 6, 2, 2], [5, 6, 7, 8], [2, 3, 5, 5]])
    assert response_mask(ids, (2, 3)).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    barred = warp(torch.zeros(1, 3, 5), Decoding(9, min_new_tokens=2), (2, 3)).exp()[0]
    assert barred.tolist() == [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]


def test_the_day_does_not_change_the_data(monkeypatch):
    tokenizer = tokenizer_of(FAMILIES["llama 3"])
    today = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "Today Date: 26 Jul 2024" in render(tokenizer, MESSAGES)
    assert "26 Jul 2024" not in today  # so the template does ask for the day


# ---- from chat messages to a policy, through the real entry points ---------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model with EOS <|endoftext|> whose template ends turns with <|im_end|>; a discriminator; chat data."""
    folder = tmp_path_factory.mktemp("base")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}?"}],
            "chosen": f"good words follow here to make the answer long w{i}",
            "rejected": f"bad words follow here to make the answer long w{i}",
        }
        for i in range(60)
    ]
    write_jsonl(folder / "chat.jsonl", rows)
    inner = byte_level_tokenizer([row["chosen"] + row["rejected"] for row in rows])._tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = FAMILIES["chatml"].template
    tiny_llama(folder / "model", tokenizer)
    config = LlamaConfig.from_pretrained(folder / "model", num_labels=2)
    AutoModelForTokenClassification.from_config(config).save_pretrained(folder / "disc")
    tokenizer.save_pretrained(folder / "disc")
    return folder


def test_label_discriminator_and_ppo_of_a_base_model_with_a_turn_end_of_its_own(base, tmp_path, in_process, capsys):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    with fault_server(log=tmp_path / "log.jsonl") as url:
        assert label(base / "chat.jsonl", url, tmp_path / "labels", tokenizer=base / "model", data_split="2,4,4") == 0
    revisions = list(read_revisions(tmp_path / "labels" / "revisions.jsonl"))
    assert revisions
    for revision in revisions:
        assert "<|" not in revision.rejected + revision.modified
        for example in label_revision(tokenizer, revision, 999):
            assert (example.response_ids[-1], example.targets[-1]) == (end, 0.5)

    data = ("--data_path", base / "chat.jsonl", "--dtype", "fp32")
    in_process(
        step2_discriminator.main.main,
        *("--model_name_or_path", base / "model", *data, "--revisions", tmp_path / "labels" / "revisions.jsonl"),
        *("--output_dir", tmp_path / "disc", "--per_device_train_batch_size", 4, "--learning_rate", 1e-3),
    )
    assert "0 responses cut" in capsys.readouterr().out

    ppo = (
        *("--actor_model_name_or_path", base / "model", "--critic_model_name_or_path", tmp_path / "disc", *data),
        *("--max_answer_seq_len", 64, "--max_prompt_seq_len", 64, "--num_warmup_steps", 0, "--eval_prompts", 4),
        *(
            "--per_device_generation_batch_size",
            4,
            "--per_device_training_batch_size",
            4,
            "--per_device_eval_batch_size",
            4,
        ),
        *("--temperature", 3, "--enable_test_mode", "--test_stop_step", 2),
    )
    for name, more in (("ppo", ()), ("late", ("--min_answer_seq_len", 64))):
        in_process(step3_ppo_tlcr.main.main, *ppo, *more, "--output_dir", tmp_path / name)
    assert GenerationConfig.from_pretrained(tmp_path / "ppo" / "actor").eos_token_id == [eos, end]
    assert end_ids(AutoTokenizer.from_pretrained(tmp_path / "ppo" / "actor")) == (eos, end)
    late = [line for line in read_metrics(tmp_path / "late" / "metrics.jsonl") if "rollout/response_length" in line]
    assert {line["rollout/response_length"] for line in late} == {64.0}

    in_process(
        own_answers,
        *("--policy", base / "model", "--data_path", base / "chat.jsonl", "--output_dir", tmp_path / "own"),
        *("--prompts", 8, "--max_answer_seq_len", 40),
    )
    for _, record in read_jsonl(tmp_path / "own" / "train.jsonl"):
        assert not record["rejected"].endswith(("<|im_end|>", "<|endoftext|>"))
        assert re.fullmatch(r"###Human: question \d+\?", context_of(record["prompt"]))  # as the next labelling shows it


@pytest.mark.parametrize("rollout", ["loop", "hf", "continuous"])
def test_a_policy_that_says_the_turn_s_end_stops_there(base, rollout, tmp_path, in_process):
    """An actor made to prefer <|im_end|>: every answer is one token, and it ended itself."""
    tokenizer = load_tokenizer(base / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    actor = ending_model(base / "model", tmp_path / "actor", end)
    answer = next(answers(load_causal_lm(actor, torch.float32), tokenizer, [[5, 6]], Decoding(9, temperature=0), 1))
    assert (answer.response_ids, answer.text, answer.ended) == ([end], "", True)
    in_process(
        step3_ppo_tlcr.main.main,
        *("--actor_model_name_or_path", actor, "--critic_model_name_or_path", base / "disc"),
        *("--data_path", base / "chat.jsonl", "--dtype", "fp32", "--rollout", rollout, "--num_warmup_steps", 0),
        *("--max_answer_seq_len", 8, "--max_prompt_seq_len", 64, "--output_dir", tmp_path / "out"),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
        *("--enable_test_mode", "--test_stop_step", 1),
    )
    (line,) = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "rollout/eos_rate" in line][:1]
    assert (line["rollout/eos_rate"], line["rollout/response_length"]) == (1.0, 1.0)


def ending_model(path: Path, folder: Path, token: int) -> Path:
    """The model with a head that finds ``token`` far likelier than any other, whatever comes before."""
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # all states are equal: layers add nothing
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder
