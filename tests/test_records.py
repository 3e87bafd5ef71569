"""Token positions and actions; tokenisation at the boundary of prompt and response; generation's masks."""

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Decoding, answers, left_pad, response_mask
from deepspeed_chat_tlcr.tokenization import (
    TokenizedExample,
    load_tokenizer,
    require_same_tokenizer,
    tokenize_prompt,
    tokenize_response,
    truncate,
)
from deepspeed_chat_tlcr.training import LengthGroupedSampler, pad_examples
from step3_ppo_tlcr.experience import Experience, Rollout, at_actions, before_actions
from step3_ppo_tlcr.logprobs import token_logprobs
from step3_ppo_tlcr.scores import action_logits

TEXTS = ["\n\nHuman: Is the sea blue?\n\nAssistant: Yes, it isn't green.", "abcdefghij naïve 東京 3.14"]


def sentencepiece_like(texts: list[str]) -> PreTrainedTokenizerFast:
    """BPE with a metaspace in front of words and bytes for what it does not know, as Llama-2's; BOS in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts[:1], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def with_final_eos(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose template ends every text with EOS itself."""
    tokenizer = byte_level_tokenizer(texts)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


TOKENIZERS = [byte_level_tokenizer, sentencepiece_like, word_level, with_final_eos]


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("response", [" Yes, it isn't green.", " naïve 東京!", "", " ", " 3"])
def test_tokens_are_those_of_the_whole_text_with_one_eos(build, response):
    tokenizer = build(TEXTS)
    prompt = "\n\nHuman: Is the sea blue?\n\nAssistant:"
    example = tokenize_response(tokenizer, prompt, response)
    whole = tokenizer(prompt + response)["input_ids"]
    whole = whole[:-1] if build is with_final_eos else whole
    assert example.input_ids == [*whole, tokenizer.eos_token_id]
    # The prompt's own tokens, in front of any response that starts with a space, are the prompt's tokens alone.
    assert example.input_ids[: example.response_start] == tokenize_prompt(tokenizer, prompt)
    assert tokenizer.eos_token_id not in tokenize_prompt(tokenizer, prompt)
    if not response.strip():
        assert len(example.response_ids) <= 2


def test_a_token_across_the_boundary_belongs_to_the_response():
    tokenizer = byte_level_tokenizer(["abab abab abab"], vocab_size=264)
    assert "ab" in tokenizer.get_vocab()
    example = tokenize_response(tokenizer, "xa", "b")
    assert tokenizer.convert_ids_to_tokens(example.response_ids) == ["ab", "</s>"]


def test_truncation_drops_the_end_never_the_prompt():
    example = TokenizedExample([1, 2, 3, 4, 9], 2, [0.5, 0.0, 1.0])
    assert truncate(example, 4) == TokenizedExample([1, 2, 3, 4], 2, [0.5, 0.0])
    assert truncate(example, 5) == example
    assert truncate(example, 2) is None


def test_tokenizer_without_eos_and_a_missing_one_are_refused(tmp_path):
    tokenizer = word_level(TEXTS)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(InputError, match="has no EOS token"):
        load_tokenizer(tmp_path / "no_eos")
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizers_that_differ_are_refused_with_both_names(tmp_path):
    byte_level_tokenizer(TEXTS).save_pretrained(tmp_path / "actor")
    word_level(TEXTS).save_pretrained(tmp_path / "judge")
    with pytest.raises(InputError) as refused:
        require_same_tokenizer(load_tokenizer(tmp_path / "actor"), load_tokenizer(tmp_path / "judge"), "discriminator")
    assert str(tmp_path / "actor") in str(refused.value)
    assert str(tmp_path / "judge") in str(refused.value)
    require_same_tokenizer(load_tokenizer(tmp_path / "actor"), load_tokenizer(tmp_path / "actor"), "discriminator")


def test_pad_examples_builds_masks_from_lengths():
    examples = [TokenizedExample([5, 6, 7, 2], 2, [1.0, 0.5]), TokenizedExample([5, 2], 1, [0.0])]
    batch = pad_examples(examples, pad_token_id=2)  # pad = EOS
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["response_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch["targets"].tolist() == [[0.5, 0.5, 1.0, 0.5], [0.5, 0.0, 0.5, 0.5]]


def test_the_shift_between_outputs_and_actions():
    # T = 5, A = 2: the actions' tokens stand at positions 3 and 4, and were chosen by the outputs at 2 and 3.
    per_token = torch.arange(5).view(1, 5)
    assert before_actions(per_token, 2).tolist() == [[2, 3]]
    assert at_actions(per_token, 2).tolist() == [[3, 4]]


def test_response_mask_counts_the_first_eos_and_nothing_behind_it():
    ids = torch.tensor([[7, 2, 2, 7], [7, 7, 7, 7], [2, 2, 2, 2]])
    assert response_mask(ids, 2).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_rows_of_an_experience_lose_only_padding():
    rollout = Rollout(
        torch.tensor([[0, 0, 5, 6, 2, 0], [3, 4, 5, 6, 7, 2], [0, 4, 5, 2, 0, 0]]),
        torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]),
    )
    rewards = torch.arange(9.0).view(3, 3)
    part = Experience(rollout, rewards, -rewards).rows(2, 3)
    assert part.rollout.input_ids.tolist() == [[4, 5, 2]]
    assert part.rollout.action_ids.tolist() == [[2]]
    assert part.rewards.tolist() == [[6.0]]
    assert part.old_values is None
    whole = Experience(rollout, rewards, -rewards).rows(0, 3)
    assert whole.rollout.input_ids.tolist() == rollout.input_ids.tolist()


def test_left_padding_changes_no_logprob(tmp_path):
    """The same prompt and response, alone and left-padded beside a longer one, get the same log-probs."""
    tokenizer = byte_level_tokenizer(TEXTS)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, tokenizer)).eval()
    alone = Rollout(
        torch.tensor([[10, 11, 12, 13]]), torch.ones(1, 4, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)
    )
    padded = Rollout(
        torch.tensor([[0, 0, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25]]),
        torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        torch.ones(2, 2, dtype=torch.long),
    )
    decoding = Decoding(max_new_tokens=2)
    first = token_logprobs(action_logits(model, alone), alone.action_ids, decoding, tokenizer.eos_token_id)
    both = token_logprobs(action_logits(model, padded), padded.action_ids, decoding, tokenizer.eos_token_id)
    torch.testing.assert_close(first[0], both[0], rtol=1e-4, atol=1e-5)
    # By hand: position 1 of the lone sequence predicts its third token.
    logits = model(alone.input_ids).logits
    assert first[0, 0].item() == pytest.approx(logits[0, 1].log_softmax(-1)[12].item(), abs=1e-5)


def test_answers_end_where_the_model_ends_them(tmp_path):
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, tokenizer))
    prompts = [tokenize_prompt(tokenizer, text) for text in ("a", "Is the sea blue?", "naïve 東京")]
    written = list(answers(model, tokenizer, prompts, Decoding(6, temperature=0), batch_size=2))
    assert [answer.prompt_ids for answer in written] == prompts
    for answer in written:
        assert answer.ended == (answer.response_ids[-1] == tokenizer.eos_token_id)
        assert len(answer.response_ids) == 6 or answer.ended
        # Greedy decoding done slowly, one full forward per token, gives the same tokens.
        ids = list(answer.prompt_ids)
        for token in answer.response_ids:
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_left_pad():
    ids, mask = left_pad([[5], [6, 7]], pad_token_id=2)
    assert ids.tolist() == [[2, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]


def test_length_grouped_batches_hold_every_example_once_and_similar_lengths():
    lengths = [(37 * index) % 101 for index in range(205)]
    sampler = LengthGroupedSampler(lengths, global_batch_size=8, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == list(range(205))
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in first[b : b + 8]] for b in range(0, 200, 8))]
    assert sum(spread) / len(spread) < 15  # a random batch of 8 spans about 80
    sampler.set_epoch(1)
    assert list(sampler) != first
