"""Golden texts for crates/data: chat templates rendered by transformers.

    pip install transformers==5.23.0 jinja2==3.1.6
    python golden/chat_templates.py crates/data/tests/golden/chat_templates.json

Reads golden/chat_templates/*.jinja. Every template meets every conversation; what a template refuses is kept as
null (the exception's text is Python's own where it is not the template's). `generation` holds the character ranges
of {% generation %} blocks.
"""

import json
import sys
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template


def say(role, text):
    return {"role": role, "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Today's weather <in> a \"city\" & more – déjà vu",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

CONVERSATIONS = {
    "one": [say("user", "Hi there")],
    "answered": [say("user", "Hi there"), say("assistant", "Hello!")],
    "system": [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Yes?")],
    "long": [
        say("system", "Be brief."),
        say("user", "One?"),
        say("assistant", "1"),
        say("user", "Two?"),
        say("assistant", "2"),
        say("user", "Three?"),
    ],
    "turns": [say("user", "One?"), say("assistant", "1"), say("user", "Two?"), say("assistant", "2")],
    "spaces": [say("user", "  a <b> & 'c' \"d\"\n\n"), say("assistant", "\n\tx \\ 日本語 🦙 é \n")],
    "shout": [say("user", "ABC"), say("assistant", "<think>\nhm\n</think>\n\nyes"), say("user", "ok"), say("assistant", "<think>no</think>fine")],
    "alternation": [say("user", "a"), say("user", "b")],
    "empty_content": [say("user", ""), say("assistant", "")],
    "stop": [say("user", "a"), say("skip", "b"), say("assistant", "c"), say("stop", "d"), say("user", "e")],
    "none": [say("user", "a"), {"role": "assistant", "content": "b", "tool_calls": None, "name": "me"}],
}
TOOL_CALL = [
    say("user", "Weather in Ulm?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ülm", "days": 2, "t": 0.5, "x": None, "y": True}}}
        ],
    },
    {"role": "tool", "name": "get_weather", "content": "rain"},
    {"role": "tool", "name": "get_weather", "content": "wind"},
    say("assistant", "It rains."),
]


def render(source, messages, tools, prompt):
    # what apply_chat_template does to messages before it renders
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    generation = "{% generation %}" in source or "{%- generation %}" in source
    try:
        texts, ranges = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=source,
            return_assistant_tokens_mask=generation,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError):
        return None, None
    return texts[0], ranges[0] if generation else None


def main(out):
    here = Path(__file__).parent / "chat_templates"
    cases = []
    for path in sorted(here.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        todo = [(name, m, None) for name, m in CONVERSATIONS.items()]
        if path.stem == "qwen25":
            todo += [("tools", CONVERSATIONS["one"], TOOLS), ("tool_call", TOOL_CALL, TOOLS), ("tool_call", TOOL_CALL, None)]
        for name, messages, tools in todo:
            for prompt in (False, True):
                text, generation = render(source, messages, tools, prompt)
                case = {"template": path.stem, "name": name, "messages": messages, "prompt": prompt, "text": text}
                if tools:
                    case["tools"] = tools
                if generation is not None:
                    case["generation"] = generation
                cases.append(case)
    text = ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases)
    Path(out).write_text("[\n" + text + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
