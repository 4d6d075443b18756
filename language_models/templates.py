"""Adapt the chat templates of LLMs, so that messages may have audio and text."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from processing_lsm import AUDIO_TOKEN

# For LLMs whose tokenizer has no chat template: Vicuna's v1.1, because base models have probably seen it most often.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

# For LLMs whose template takes no system message (Gemma, early Mistrals): puts it before the user's first message.
FOLD_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' and messages[1] is defined and messages[1]['role'] == 'user' -%}"
    "{%- set opening = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}"
    "{%- set messages = [dict(messages[1], content=opening)] + messages[2:] -%}"
    "{%- endif %}\n"
)

# Put before the LLM's own template, which then gets strings: the parts of a message, joined by newlines, with the
# placeholder for audio. Jinja's `trim_blocks`, which transformers sets, removes the newline at the end.
_PRELUDE = """\
{%- set lsm = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}
{%- set lsm.parts = [] -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'audio' -%}
{%- set lsm.parts = lsm.parts + ['AUDIO_TOKEN'] -%}
{%- elif part['type'] == 'text' -%}
{%- set lsm.parts = lsm.parts + [part['text']] -%}
{%- else -%}
{{- raise_exception('An LSM takes text and audio, not ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set lsm.messages = lsm.messages + [dict(message, content=lsm.parts | join('\\n'))] -%}
{%- else -%}
{%- set lsm.messages = lsm.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = lsm.messages %}
"""


def speech_template(template: str | dict | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an LLM's chat template for messages with parts of text and audio.

    A prelude joins the parts, and [`FOLD_SYSTEM`] is added if the LLM takes no system message. A template that names
    the audio placeholder is returned unchanged, because it renders audio parts itself. Of several templates, the
    default one is used; in the place of None, [`DEFAULT_CHAT_TEMPLATE`].
    """
    text: str = (template["default"] if isinstance(template, dict) else template) or DEFAULT_CHAT_TEMPLATE
    if AUDIO_TOKEN in text:
        return text
    fold = "" if _takes_system(text, tokenizer) else FOLD_SYSTEM
    return _PRELUDE.replace("AUDIO_TOKEN", AUDIO_TOKEN) + fold + text


def _takes_system(template: str, tokenizer) -> bool:
    """Return whether a system message appears in the prompt. Some templates raise an error, and others drop it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    try:
        return "Be brief." in tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except TemplateError:
        return False
