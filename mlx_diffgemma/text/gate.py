"""The gate that every text of a user passes: valid Unicode, and conversations of the right kind.

Wherever it comes from (an argument, standard input, a file, a line of training data, a caller), what is refused here is
refused in the same words; what passes means to the chat template what it means under transformers.
"""

from typing import Any

from ..errors import DiffGemmaError, PromptError
from ..readers import check_tree
from ..values import half_character, shown

Message = dict[str, Any]
Fault = type[DiffGemmaError]

READS = frozenset(("text",))  # the kinds of parts that reach the model
PICTURES = READS | {"image", "video"}  # and where pictures have been taken out of the messages: their places are left
SEEN = {  # a part that it cannot take in → what that is called
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "a sound",
    "input_audio": "a sound",
    "audio_url": "a sound",
    "video": "a video",
    "video_url": "a video",
    "file": "a file",
}


def check_text(text: Any, where: str, *, fault: Fault = PromptError) -> str:
    """`text`, which `where` names in the errors. Errors: `fault` for half characters, and for what is no text."""
    if not isinstance(text, str):
        raise fault(f"{where} is {shown(text)}, expected text.")
    if (place := half_character(text)) is not None:
        raise fault(
            f"{where} holds half a character (U+{ord(text[place]):04X}, a lone surrogate) at position {place}.\n"
            "Give it as UTF-8 text."
        )
    return text


def check_messages(
    messages: Any, where: str = "messages", *, reads: frozenset[str] = READS, fault: Fault = PromptError
) -> list[Message]:
    """A conversation without the keys that are None, as transformers' apply_chat_template leaves them out.

    `reads` are the kinds of parts that the model takes in. Errors: `fault`, naming the message and what is wrong.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise fault(f'{where} is {shown(messages)}, expected a list of messages {{"role": …, "content": …}}.')
    check_tree(messages, where, fault=fault)
    return [_message(message, f"{where}[{i}]", reads, fault) for i, message in enumerate(messages)]


def _message(message: Any, where: str, reads: frozenset[str], fault: Fault) -> Message:
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise fault(f'{where} is {shown(message)}, expected a message {{"role": …, "content": …}}.')
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or not role.strip():
        raise fault(f"{where}.role is {shown(role)}, expected text: user, assistant, system or tool.")
    content = kept.get("content", "")
    if isinstance(content, list | tuple):
        kept["content"] = [_part(part, f"{where}.content[{i}]", reads, fault) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise fault(f"{where}.content is {shown(content)}, expected text or a list of parts.")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise fault(f"{where}.tool_calls is {shown(calls)}, expected a list of calls.")
    return kept


def _part(part: Any, where: str, reads: frozenset[str], fault: Fault) -> Message:
    if not isinstance(part, dict):
        raise fault(f'{where} is {shown(part)}, expected a part {{"type": "text", "text": …}}.')
    kind = part.get("type")
    if kind in SEEN and kind not in reads:
        raise fault(
            f"{where} is {SEEN[kind]}, which this model does not take in here: it would answer without it.\n"
            'Leave it out, or describe it in words: {"type": "text", "text": …}.'
        )
    if not isinstance(kind, str) or kind not in reads:
        raise fault(f"{where}.type is {shown(kind)}, expected {' or '.join(map(repr, sorted(reads)))}.")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise fault(f"{where}.text is {shown(part.get('text'))}, expected text.")
    return dict(part)


def check_tools(tools: Any, where: str = "tools", *, fault: Fault = PromptError) -> list[dict[str, Any]] | None:
    """Tools as a list of JSON schemas, or None. Errors: `fault`."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise fault(f'{where} is {shown(tools)}, expected a list of {{"type": "function", "function": …}}.')
    check_tree(tools, where, fault=fault)
    return list(tools)
