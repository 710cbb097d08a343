"""The demo's tokenizer and chat template: byte-level BPE on the training split's text, LLaVA-style turns."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.easy_vqa import DESCRIBE, Described

END = "<|endoftext|>"
PAD = "<|pad|>"
IMAGE = "<image>"
VOCABULARY_LIMIT = 512
MAX_LENGTH = 2048

# The space before an answer belongs to it, so that a prompt's tokens are a prefix of the whole text's.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT:' }}"
    "{%- else -%}{{ raise_exception('roles are user and assistant, not ' ~ message['role']) }}{%- endif -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set parts.text = message['content'] -%}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{%- set parts.text = parts.text ~ '<image>\n' -%}"
    "{%- else -%}{%- set parts.text = parts.text ~ item['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{ parts.text ~ ' ' }}"
    "{%- else -%}{% generation %}{{ ' ' ~ parts.text ~ '<|endoftext|>' }}{% endgeneration %}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def turn_text(question: str, answer: str) -> str:
    """One turn as the chat template writes it."""
    return f"USER: {question} ASSISTANT: {answer}{END}"


def training_texts(pictures: Sequence[Described]) -> Iterator[str]:
    """The text of a split: every turn, the captions, and the request for one, without image tokens."""
    for picture in pictures:
        for caption in picture.captions:
            yield f"{caption}\n"
            yield turn_text(f"\n{DESCRIBE}", caption)
        for question, answer in picture.questions:
            yield turn_text(question, answer)
            yield turn_text(f"\n{question}", answer)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; deterministic. It contains all bytes, so it can encode any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Untrimmed offsets keep an answer's leading space inside the template's generation mark.
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=[END, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain = (text.replace(END, "") for text in texts)
    backend.train_from_iterator(plain, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
