"""Which tokenizers do the data tests use? Real ones, trained in a moment on a few sentences, so that no test needs a network."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat. the dog ran after the cat, and the cat ran away.",
    "Question: where is the cat? Answer: the cat is on the mat.",
    "Question: where is the dog? Answer: the dog is after the cat.",
    "user\nhello there\n\nassistant\nhello, how can I help you today?\n",
    "\n\nHuman: what is the cat called? \n\nAssistant: the cat has no name.",
] * 8

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Ends every turn with a special token and a newline, as SmolLM2 and Qwen do."""

WITH_BOS = "{{ bos_token }}" + CHATML
"""Writes the BOS token itself, as Llama 3 does."""

TWO_ENDS = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""Ends the turn and then the text, as Phi-3 does: only the first of the two is what the model says to end its turn."""

WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends turns with nothing but a newline."""

TRIMS_ANSWER_SPACE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
"""Asks with a trailing space that it does not write before an answer."""

OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""Asks with an opened block that rendered answers do not have, as some reasoning models do."""

THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes a thinking block before an answer that ends the conversation, and none before earlier ones, as Qwen3 does."""

FORGETS = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves out what the assistant said before."""

ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
"""Refuses system messages and two turns of one speaker in a row, as Gemma does."""

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
_TURN_TOKENS = ["<|im_start|>", "<|im_end|>"]


def _special_tokens() -> list[str]:
    return [*dict.fromkeys(_SPECIAL.values()), *_TURN_TOKENS]


@cache
def _trained(kind: str) -> str:
    """The trained tokenizer as JSON, of which every caller gets a copy."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "sentencepiece"))
    options = {"special_tokens": _special_tokens(), "vocab_size": 700, "show_progress": False}
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        options["initial_alphabet"] = [chr(code) for code in range(33, 127)]
        options["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)]
        options["vocab_size"] = 1000
    else:
        # without the usual regex, merges run across spaces and words, so boundaries are merged over often
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "words")
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(**options))
    return tokenizer.to_str()


def small_tokenizer(
    kind: str = "words", *, chat_template: str | None = None, adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer of a few hundred tokens.

    Args:
        kind: "words" (byte-level BPE that splits as GPT-2 does), "merging" (byte-level BPE that merges across everything) or
            "sentencepiece" (puts a space before a text that stands alone).
        chat_template: Its chat template, if any.
        adds_bos, adds_eos: It puts BOS before, EOS after, a text when asked for special tokens.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    single = " ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos)
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=_TURN_TOKENS, **_SPECIAL)
    fast.chat_template = chat_template
    return fast
