"""Chat templates of the structure that well-known families use, written for these tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A template, the special tokens it writes, and what an answer's span holds beside the answer.

    system: what becomes of a system prompt: `kept`, or the reason of the rejection. trims: answers lose the
    blanks around them. eos: the tokenizer's end token.
    """

    text: str
    specials: tuple[str, ...]
    lead: str = ""
    end: str = ""
    system: str = "kept"
    trims: bool = False
    eos: str = "</s>"
    bos: str = "<s>"


def of_parts(image: str, *, between: str = "") -> str:
    """A loop that writes `message.content`, text or parts."""
    return (
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{- '"
        + image
        + "' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
        + between
        + "{%- endfor -%}{%- endif -%}"
    )


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

FAMILIES = {
    # a default system prompt; vision tokens around each image
    "qwen2.5-vl": Family(
        text="{%- for message in messages -%}"
        "{%- if loop.first and message.role != 'system' -%}"
        "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
        "{{- '<|im_start|>' ~ message.role ~ '\\n' -}}"
        + of_parts("<|vision_start|><|image_pad|><|vision_end|>")
        + "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
        specials=CHATML,
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    # thoughts are cut out of earlier answers, and an empty one is written before the last
    "qwen3-thinking": Family(
        text="{%- set place = namespace(last=messages|length - 1, looking=true) -%}"
        "{%- for message in messages[::-1] -%}{%- set index = (messages|length - 1) - loop.index0 -%}"
        "{%- if place.looking and message.role == 'user' -%}"
        "{%- set place.looking = false -%}{%- set place.last = index -%}{%- endif -%}{%- endfor -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}"
        "{%- set said = message.content -%}{%- set thought = '' -%}"
        "{%- if '</think>' in said -%}"
        "{%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
        "{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
        "{%- if loop.index0 > place.last and (loop.last or thought) -%}"
        "{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n'"
        " + said.lstrip('\\n') -}}"
        "{%- else -%}{{- '<|im_start|>assistant\\n' + said -}}{%- endif -%}{{- '<|im_end|>\\n' -}}"
        "{%- else -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
        "{%- if enable_thinking is defined and enable_thinking is false -%}"
        "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}",
        specials=CHATML,
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    # the day it is, in a system turn that is always there
    "llama3.2-vision": Family(
        text="{{- bos_token -}}"
        "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
        "{%- set date_string = strftime_now('%d %b %Y') -%}"
        "{%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}{%- endif -%}"
        "{%- if messages[0].role == 'system' -%}"
        "{%- set system = messages[0].content -%}"
        "{%- set system = system if system is string else system[0].text -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
        "{%- set found = namespace(image=false) -%}"
        "{%- for message in messages -%}{%- for part in message.content if message.content is not string -%}"
        "{%- if part.type == 'image' -%}{%- set found.image = true -%}{%- endif -%}"
        "{%- endfor -%}{%- endfor -%}"
        "{%- if found.image and system -%}{{- raise_exception('no system prompt') -}}{%- endif -%}"
        "{%- if not found.image -%}"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ date_string ~ '\\n\\n' -}}"
        "{{- system ~ '<|eot_id|>' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}"
        + of_parts("<|image|>")
        + "{{- '<|eot_id|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}",
        specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        system="template",
    ),
    "llama4": Family(
        text="{{- bos_token -}}{%- for message in messages -%}"
        "{{- '<|header_start|>' ~ message.role ~ '<|header_end|>\\n\\n' -}}"
        + of_parts("<|image|>")
        + "{{- '<|eot|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|header_start|>assistant<|header_end|>\\n\\n' -}}{%- endif -%}",
        specials=("<|header_start|>", "<|header_end|>", "<|eot|>"),
        end="<|eot|>",
        eos="<|eot|>",
    ),
    # the system prompt begins the first question; turns must alternate; everything is trimmed
    "gemma3": Family(
        text="{{- bos_token -}}"
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}"
        "{%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}"
        "{%- endif -%}"
        "{%- for message in turns -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') -}}"
        "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
        "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'image' -%}{{- '<start_of_image>' -}}"
        "{%- elif item['type'] == 'text' -%}{{- item['text'] | trim -}}{%- endif -%}{%- endfor -%}"
        "{%- else -%}{{- raise_exception('no content') -}}{%- endif -%}"
        "{{- '<end_of_turn>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
        specials=("<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>"),
        end="<end_of_turn>",
        trims=True,
        eos="<eos>",
        bos="<bos>",
    ),
    # text content; one more end token closes a whole conversation
    "phi3.5-vision": Family(
        text="{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content']"
        " + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        specials=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        end="<|end|>",
        eos="<|endoftext|>",
    ),
    "internvl": Family(
        text="{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for content in message['content'] -%}"
        "{%- if content['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}"
        "{%- elif content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}{%- endfor -%}"
        "{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
        specials=CHATML,
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    # the colon before an image has no blank; the generation prompt ends before the blank of an answer
    "smolvlm": Family(
        text="<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for line in message['content'] %}"
        "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        specials=("<|im_start|>", "<end_of_utterance>"),
        lead=" ",
        end="<end_of_utterance>",
        eos="<end_of_utterance>",
    ),
    "idefics3": Family(
        text="{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}"
        "{{ ':' if message.content[0].type == 'image' else ': ' }}"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        specials=("<|begin_of_text|>", "<end_of_utterance>"),
        lead=" ",
        end="<end_of_utterance>",
        eos="<end_of_utterance>",
        bos="<|begin_of_text|>",
    ),
    # the system prompt stands in the last question; answers are closed by the end of the sequence
    "pixtral": Family(
        text="{%- if messages[0].role == 'system' -%}"
        "{%- set system = messages[0].content if messages[0].content is string"
        " else messages[0].content[0].text -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}{%- set turns = messages -%}{%- endif -%}{{- bos_token -}}"
        "{%- set asked = namespace(last=0) -%}"
        "{%- for message in turns -%}{%- if message.role == 'user' -%}{%- set asked.last = loop.index -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- for message in turns -%}{%- if message.role == 'user' -%}{{- '[INST]' -}}"
        "{%- if loop.index == asked.last and system is defined -%}{{- system ~ '\\n\\n' -}}{%- endif -%}"
        + of_parts("[IMG]")
        + "{{- '[/INST]' -}}{%- elif message.role == 'assistant' -%}"
        + of_parts("[IMG]")
        + "{{- eos_token -}}{%- else -%}{{- raise_exception('no such role') -}}{%- endif -%}{%- endfor -%}",
        specials=("[INST]", "[/INST]", "<s>", "</s>"),
        end="</s>",
    ),
    # a blank after the header, none in the generation prompt
    "deepseek-vl2": Family(
        text="{{- bos_token -}}{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}"
        "{%- elif message.role == 'user' -%}{{- '<|User|>: ' + message.content + '\\n\\n' -}}"
        "{%- else -%}{{- '<|Assistant|>: ' + message.content + eos_token -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}",
        specials=("<|User|>", "<|Assistant|>", "<eos>"),
        lead=" ",
        end="<eos>",
        eos="<eos>",
    ),
    # no end of a turn but the next one's header; an empty thought before every answer
    "glm4v": Family(
        text="[gMASK]<sop>{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{{- '<|user|>\\n' -}}"
        + of_parts("<|begin_of_image|><|image|><|end_of_image|>")
        + "{%- elif message.role == 'assistant' -%}{{- '<|assistant|>\\n<think></think>\\n' -}}"
        + of_parts("")
        + "{%- else -%}{{- '<|system|>\\n' -}}"
        + of_parts("")
        + "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}",
        specials=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        eos="<|endoftext|>",
    ),
    "minicpm-v": Family(
        text="{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        specials=CHATML,
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    # marks of its own, around the text alone: the end of a turn is not learned
    "llava-onevision": Family(
        text="{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
        "{% endfor %}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
        "{{'<|im_end|>'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        specials=CHATML,
        lead="\n",
        eos="<|im_end|>",
    ),
    "llava-1.5": Family(
        text="{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
        "{% endfor %}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        specials=("<s>", "</s>"),
        end=" ",
    ),
    # plain words as headers, nothing at all between turns
    "molmo": Family(
        text="{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system prompt') }}{% endif %}"
        "{{ (' ' if not loop.first else '') + message['role'].capitalize() + ': ' + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}",
        specials=("<|endoftext|>",),
        lead=" ",
        system="template",
        eos="<|endoftext|>",
    ),
    # the end of the sequence after every answer; the question writes the next header
    "vicuna": Family(
        text="{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{- message.content ~ ' ' -}}"
        "{%- elif message.role == 'user' -%}{{- 'USER: ' ~ message.content ~ ' ASSISTANT:' -}}"
        "{%- else -%}{{- ' ' ~ message.content ~ eos_token -}}{%- endif -%}{%- endfor -%}",
        specials=("<s>", "</s>"),
        lead=" ",
        end="</s>",
    ),
    # blanks around an answer, the system prompt inside the first question
    "llama2": Family(
        text="{%- if messages[0].role == 'system' -%}"
        "{%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}"
        "{%- endif -%}{%- for message in turns -%}{%- if message.role == 'user' -%}"
        "{{- bos_token ~ '[INST] ' ~ (system if loop.first else '') -}}"
        "{{- message.content.strip() ~ ' [/INST]' -}}"
        "{%- else -%}{{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token -}}{%- endif -%}{%- endfor -%}",
        specials=("<s>", "</s>"),
        lead=" ",
        end=" </s>",
        trims=True,
    ),
    "kimi-vl": Family(
        text="{%- for message in messages -%}"
        "{{- '<|im_' ~ message.role ~ '|>' ~ message.role ~ '<|im_middle|>' -}}"
        + of_parts("<|media_start|>image<|media_content|><|media_pad|><|media_end|>")
        + "{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}",
        specials=("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"),
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
    # marks around an empty thought too, and everything up to the end of the turn
    "thinking-marked": Family(
        text="{%- for message in messages -%}{{- '<|im_start|>' ~ message.role ~ '\\n' -}}"
        "{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{- '<think>\\n\\n</think>\\n\\n' ~ message.content ~ '<|im_end|>' -}}"
        "{%- endgeneration -%}{{- '\\n' -}}"
        "{%- else -%}{{- message.content ~ '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
        specials=CHATML,
        end="<|im_end|>",
        eos="<|im_end|>",
    ),
}

THINK_FIRST = (
    "{%- for message in messages -%}{{- '<|' ~ message.role ~ '|>' ~ message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"
)
"""As DeepSeek-R1's distilled models: asked for an answer, it opens a thought that finished answers lack."""
