"""Chat templates: as transformers renders them, and stopped when they would use up the machine."""
# ruff: noqa: E501  (templates stand on one line)

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.errors import TokenizerError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.text import template

USER = {"role": "user", "content": " Hi there\n"}
CALL = {"function": {"name": "f", "arguments": {"b": [1, 2.5, None, {"é": True}], "a": "x"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yes."}, USER],
    [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "42", "name": "f"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [USER, {"role": "assistant", "content": "x", "reasoning": "because"}, USER],
]
# What templates in the wild do, feature by feature.
TEMPLATES = {
    "loops": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if not loop.last %},{% endif %}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.role }}-{{ loop.nextitem.role }};{% endfor %}",
    "filtered loops": "{% for m in messages if m.role != 'system' %}{{ m.role }}{% else %}none{% endfor %}",
    "control": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n ** 2 }}",
    "macros": "{% macro w(x, y=1) %}<{{ x }}{{ y }}>{% endmacro %}{% for m in messages %}{{ w(m.role, y='!') }}{% endfor %}",
    "blocks": "{% set x %}a{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | upper }}{{ x | length }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}",
    "joins": "{{ 'a' ~ messages | length ~ none ~ [1, 'b'] ~ {'c': 1.5} ~ (1, 2) }}{{ ['x', 1] | join('-') }}",
    "texts": "{{ ('%s is %05.1f%%' % ('x', 2)) }}{{ '{:>6}|{}'.format(7, 12345678) }}{{ 'ab' * 3 }}{{ 'a,b'.split(',')[1] }}",
    "filters": "{{ messages | map(attribute='role') | unique | list }}{{ messages | selectattr('content') | list | length }}",
    "items": "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v | string | trim | indent(2) }};{% endfor %}",
    "tests": "{% for m in messages %}{{ m.content is string }}{{ m.x is defined }}{{ m.content is mapping }}{% endfor %}",
    "slices": "{{ messages[::-1] | map(attribute='role') | join }}{{ 'hello'[1:3] }}{{ range(1, 9, 3) | list }}{{ 7 // 2 }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "recursion": "{% for m in messages recursive %}{{ m.role }}{{ loop(m.tool_calls) if m.tool_calls }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "variables": "{{ bos_token }}{{ enable_thinking | default('unset') }}{{ add_generation_prompt }}{{ unknown }}",
    "helpers": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}{{ strftime_now('%Y') | length }}{% set c = cycler(1, 2) %}{{ c.next() }}",
    "raising": "{% if messages | length > 1 %}{{ raise_exception('too many') }}{% endif %}ok",
    "undefined": "{{ messages[0].nothing.more }}",
    "wrong kinds": "{{ messages[0].role + 1 }}",
    "private": "{% set ns = namespace() %}{{ messages.__class__ }}{{ namespace(_x=1) }}",
    "mutation": "{{ messages.append(1) }}",
    "blanks": "{%- for m in messages -%}\n   {{ m.role }}   \n{%- endfor -%}\n\n  {# nothing #}\n  {% if true %}\n x\n  {% endif %}\n",
    "nothing": "",
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", [*TEMPLATES, "built-in"])
def test_as_transformers_renders_them(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (BUILT_IN / "chat_template.jinja").read_text() if name == "built-in" else TEMPLATES[name]
    seen = set()
    for conversation in CONVERSATIONS:
        for tools in (None, TOOLS):
            for variables in ({}, {"enable_thinking": True}):
                given = {"tools": tools, "bos_token": "<bos>", "add_generation_prompt": True, **variables}
                try:
                    right = render_jinja_template([conversation], chat_template=source, documents=None, **given)[0][0]
                except Exception as error:
                    right = None
                    with pytest.raises(TokenizerError, match=r"^here "):
                        template.render(source, "here", conversation, documents=None, **given)
                    seen.add(type(error).__name__)
                else:
                    assert template.render(source, "here", conversation, documents=None, **given) == right
                    seen.add(right)
    assert seen  # every template was rendered, or refused by both


BOMBS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops over one": "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% for c in r %}x{% endfor %}{% endfor %}{% endfor %}",
    "loops over text": "{% set r = 'a' * 9999 %}{% for a in r %}{% for b in r %}{% for c in r %}{{ a }}{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "negative power": "{{ (-9) ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "text times": "{{ 'a' * 40000000000 }}",
    "times text": "{{ 40000000000 * 'a' }}",
    "list times": "{{ [1] * 40000000000 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nesting": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nesting tables": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "keys": "{{ dict.fromkeys(range(100000), range(100000) | list) | tojson }}",
    "padding": "{{ 'a'.ljust(9999999999) }}",
    "zeros": "{{ '1'.zfill(9999999999) }}",
    "centre": "{{ 'a' | center(9999999999) }}",
    "mapped": "{{ [1, 2] | map('center', 9999999999) | list }}",
    "printf": "{{ '%9999999999d' % 5 }}",
    "printf, width given": "{{ '%*d' % (999999999, 5) }}",
    "precision": "{{ '%.999999999f' % 5 }}",
    "format": "{{ '{:>9999999999}'.format(5) }}",
    "format, width given": "{{ '{:{}}'.format(5, 9999999999) }}",
    "format filter": "{{ '%9999999999s' | format(5) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "glue": "{{ ('a' * 1000) | list | join('b' * 1000000) }}",
    "glue, method": "{{ ('b' * 1000000).join(('a' * 1000) | list) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(1000000) }}",
    "indent": "{{ ('\n' * 100000) | indent(1000000) }}",
    "indented json": "{{ messages | tojson(indent=999999999) }}",
    "rounding": "{{ 1.5 | round(999999999, 'ceil') }}",
    "batches": "{{ [1] | batch(999999999, 'x') | list }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "fanning out": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "captured": "{% set x %}{% for i in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}",
    "output": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "brackets": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "source": "a" * 1_100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_one_that_is_too_expensive_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        template.render(BOMBS[name], "m/chat_template.jinja", [USER])
    assert time.monotonic() - begun < 10
    assert str(caught.value).startswith("m/chat_template.jinja ") and len(str(caught.value).splitlines()) <= 3
    assert "was stopped: it takes" in str(caught.value) or "expected a template of at most" in str(caught.value)


def test_long_conversations_are_no_bombs() -> None:
    long = [{"role": "user", "content": "word " * 200_000}, {"role": "assistant", "content": "ok"}] * 4
    source = (
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all ~ m.content.replace('w', 'ww') | trim %}"
        "{{ '%s: %s' % (m.role, m.content | indent(4) | wordwrap(79)) }}{% endfor %}{{ ns.all }}"
    )
    assert len(template.render(source, "here", long)) > 8_000_000


@given(st.text(alphabet="{}%# abm'~*|(.)[]0-9\n", max_size=40))
def test_whatever_stands_in_it_the_error_names_the_file(source: str) -> None:
    try:
        template.render(source, "m/chat_template.jinja", [USER])
    except TokenizerError as error:
        assert str(error).startswith("m/chat_template.jinja ")


def test_what_it_writes_and_reads() -> None:
    source = "{{ bos_token }}<|turn>{{ 'model' if enable_thinking else \"user\" }}"
    assert template.literals(source, "here").split("\0") == ["<|turn>", "model", "user"]
    assert template.mentions(source, "here", "enable_thinking")
    assert not template.mentions(source, "here", "tools")
