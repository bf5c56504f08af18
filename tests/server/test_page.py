"""The page as files: what a browser is not needed for. `make clients` opens it in one."""

import json
import re
from html.parser import HTMLParser

from mlx_diffgemma.server.app import FOLDER, PAGE, SAFE
from mlx_diffgemma.terminal.scenes import TASKS

HTML, CSS, JS = ((FOLDER / name).read_text(encoding="utf-8") for name in PAGE.values())


class Elements(HTMLParser):
    """Every element with its attributes, and what stands between the tags of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


ELEMENTS = Elements()
IDS = [attributes["id"] for _, attributes in ELEMENTS.found if "id" in attributes]


def test_the_policy_has_nothing_inline_to_forbid() -> None:
    assert "default-src 'self'" in SAFE["content-security-policy"] and "unsafe" not in SAFE["content-security-policy"]
    assert not ELEMENTS.inline and "style" not in [tag for tag, _ in ELEMENTS.found]
    handlers = [name for _, attributes in ELEMENTS.found for name in attributes if name.startswith("on")]
    assert not handlers and not [1 for _, attributes in ELEMENTS.found if "style" in attributes]


def test_everything_is_loaded_from_here() -> None:
    loaded = [a.get("href") or a.get("src") or "" for tag, a in ELEMENTS.found if tag in ("link", "script", "img")]
    assert sorted(name for name in loaded if not name.startswith("data:")) == ["page.css", "page.js"]
    assert not re.search(r"//[\w.-]+\.\w|@import|url\(", CSS) and not re.search(r"https?://|import\b|//cdn", JS)


def test_what_a_model_says_becomes_text_nodes_alone() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", JS)


def test_the_script_finds_what_it_looks_for() -> None:
    assert len(set(IDS)) == len(IDS)
    wanted = set(re.findall(r'(?:\$|number)\("([\w-]+)"\)', JS))
    assert len(wanted) > 25 and wanted <= set(IDS)
    shapes = re.search(r"for \(const name of (\[.*?\])\) \$\(`shape-", JS)
    assert shapes and {f"shape-{name}" for name in json.loads(shapes[1])} <= set(IDS)
    for _, attributes in ELEMENTS.found:
        for name in ("for", "aria-controls", "aria-labelledby"):
            assert attributes.get(name) in (None, *IDS)


def test_every_class_that_the_script_gives_has_a_look() -> None:
    given = set(re.findall(r'className: "([\w ]+)"|classList\.\w+\("([\w-]+)"', JS))
    names = {name for pair in given for part in pair for name in part.split()}
    assert len(names) > 15 and [name for name in names - {"turn"} if f".{name}" not in CSS] == []


def test_the_examples_are_the_built_in_models() -> None:
    """The page has the prompts of `mlx_diffgemma.generate`'s scenes once more: it is static."""
    found = re.search(r"const BUILT_IN = (\[.*?\n\]);", JS, re.DOTALL)
    assert found
    ours = {(task.name, task.prompt, task.seed) for task in TASKS}
    assert {(task["name"], task["prompt"], task["seed"]) for task in json.loads(found[1])} == ours
