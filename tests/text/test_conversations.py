from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfft.errors import InputError
from hfft.text.conversations import Conversations, chat_template, conversation_flaw, read_template
from tests.byte_models import END, byte_tokenizer

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (  # as Qwen3 and R1: what was thought in earlier turns is left out
    "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %} hm{% endif %}"
    " {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi ab"},
    {"role": "assistant", "content": "héllo 🙂"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


def written(template: str, chat: Any = CHAT, **how: Any) -> tuple[str, list[str]]:
    """A conversation's text, and the stretches of it that are learned."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ids, said = Conversations(tokenizer, **how)(chat, "data: example 3")
    assert len(ids) == len(said)
    stretches: list[list[int]] = []
    for place, token in enumerate(ids):
        if said[place] and not (place and said[place - 1]):
            stretches.append([])
        if said[place]:
            stretches[-1].append(token)
    return tokenizer.decode(ids), [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_turns_are_learned_with_their_ends_and_nothing_else(template: str) -> None:
    tokenizer = byte_tokenizer()
    text, learned = written(template)
    assert learned == ["héllo 🙂<|im_end|>", "bye<|im_end|>"]
    assert text == tokenizer.apply_chat_template(CHAT, chat_template=CHATML, tokenize=False)


def test_turns_after_the_assistants_last_are_not_learned() -> None:
    for template in (CHATML, MARKED):
        assert written(template, CHAT[:4])[1] == ["héllo 🙂<|im_end|>"]


def test_template_that_ends_turns_with_no_token_gets_the_end_of_text() -> None:
    text, learned = written(PLAIN)
    assert learned == ["héllo 🙂\n", f"bye\n{END}"]
    assert text.endswith(f"assistant: bye\n{END}")
    assert written(PLAIN, CHAT[:4])[0].endswith("user: and?\n")


def test_template_may_end_the_conversation_too() -> None:
    ending = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert written(ending)[1] == ["héllo 🙂<|im_end|>", f"bye<|im_end|>\n{END}"]


def test_everything_is_learned_where_asked_even_of_a_template_that_rewrites_turns() -> None:
    for template in (CHATML, MARKED, FORGETFUL):
        text, learned = written(template, everything=True)
        assert learned == [text]


def test_template_that_writes_turns_differently_later_is_an_error() -> None:
    assert written(FORGETFUL, CHAT[:3])[1] == [f" hm héllo 🙂\n{END}"]
    with pytest.raises(InputError, match=r"example 3: .*differently.*task\.chat_template.*loss_on"):
        written(FORGETFUL)


def test_what_the_template_refuses_is_named() -> None:
    with pytest.raises(InputError, match=r"example 3: .*can't write.*: roles must alternate; mend"):
        written("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("template", ["{{ messages + 1 }}", "{{ 1 / 0 }}", "{% for m in"])
def test_template_that_fails_is_named(template: str) -> None:
    with pytest.raises(InputError, match=r"data: example 3: the chat template can't write this"):
        written(template)


def test_template_that_leaves_out_the_answers_is_an_error() -> None:
    with pytest.raises(InputError, match="leaves out what the assistant says"):
        written("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")


def test_tokenizer_without_a_template_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no chat template.*task\.chat_template"):
        chat_template(byte_tokenizer())


def test_template_is_given_itself_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    assert read_template(str(file)) == read_template(CHATML) == CHATML
    with pytest.raises(InputError, match=r"task\.chat_template: 'chat\.jinja' is neither"):
        read_template("chat.jinja")


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "a"} for role in roles]


@pytest.mark.parametrize(
    ("chat", "flaw"),
    [
        (turns("user", "assistant"), ""),
        (turns("system", "user", "assistant", "user"), ""),
        ([], "has no assistant turn"),
        (turns("user"), "has no assistant turn"),
        (turns("assistant", "user"), "begins with an assistant turn, which answers nothing"),
        (turns("user", "bot"), "has a turn 1 of role 'bot'; roles are system, developer, user"),
        ([{"from": "human", "value": "a"}], "has a turn 0 of role None; roles are"),
        ([*turns("user"), {"role": "assistant", "content": " \n"}], "has an empty turn 1 (assis"),
        ([*turns("user"), {"role": "assistant", "content": None}], "has an empty turn 1 (assis"),
    ],
)
def test_what_keeps_a_conversation_from_being_learned_is_said(chat: Any, flaw: str) -> None:
    found = conversation_flaw(chat, answered=True)
    assert found.startswith(flaw)
    assert bool(found) == bool(flaw)


def test_a_conversation_to_be_answered_ends_with_somebody_elses_turn() -> None:
    assert conversation_flaw(turns("user"), answered=False) == ""
    for chat in ([], turns("user", "assistant")):
        assert conversation_flaw(chat, answered=False) == "has no turn that asks for an answer"
