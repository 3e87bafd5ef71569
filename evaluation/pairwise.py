"""The prompt by which a judge compares two answers to one question, in both orders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_jsonl

SYSTEM = (
    "You compare two answers to the same instruction and decide which of them serves the person who asked better. "
    "Weigh how well each answer follows the instruction, whether what it says is true, and how helpful, clear and "
    "harmless it is. Neither the order of the answers nor their length is a reason to prefer one."
)
TEMPLATE = (
    "Instruction:\n{question}\n\n<<< Answer A >>>\n{answer_a}\n<<< end of answer A >>>\n\n"
    "<<< Answer B >>>\n{answer_b}\n<<< end of answer B >>>\n\n"
    "Give your reasons in a few sentences. Then end with your verdict on a line of its own: [[A]] where answer A is "
    "better, [[B]] where answer B is better, [[C]] where neither is."
)
PROMPT_NAME = "pair-v2"  # FastChat's for two answers to one question


@dataclass(frozen=True)
class PairPrompt:
    """How a judge is asked: ``template`` has {question}, {answer_a}, {answer_b}; it answers [[A]], [[B]] or [[C]]."""

    system: str = SYSTEM
    template: str = TEMPLATE

    def messages(self, question: str, first: str, second: str) -> list[dict]:
        # No text can end its own frame: our template's marks begin with <<<.
        question, first, second = (text.replace("<<<", "<< <") for text in (question, first, second))
        user = self.template.format(question=question, answer_a=first, answer_b=second)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def read_pair_prompt(path: str | None) -> PairPrompt:
    """Our prompt, or the one named pair-v2 in a file of FastChat's form (judge_prompts.jsonl)."""
    if path is None:
        return PairPrompt()
    for line, record in read_jsonl(Path(path)):
        if record.get("name") == PROMPT_NAME:
            prompt = PairPrompt(record.get("system_prompt", ""), record.get("prompt_template", ""))
            try:
                prompt.messages("", "", "")
            except (KeyError, IndexError, ValueError) as error:
                raise InputError(f"--judge_prompts {path}:{line}: unknown placeholder ({error})") from None
            return prompt
    raise InputError(f"--judge_prompts {path}: no prompt named {PROMPT_NAME}")


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of models, the later one first: "tlcr against sft" for models given as sft, tlcr."""
    return [(names[j], names[i]) for j in range(len(names)) for i in range(j)]
