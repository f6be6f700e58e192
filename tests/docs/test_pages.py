"""Pages for people say what the code does: their Python examples run, block after block, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
}
EXAMPLES = {name: text for name, text in PAGES.items() if "```python" in text}


def python_of(text: str) -> str:
    """The fenced Python blocks, each on the lines that it has on its page, so that tracebacks point there."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    return "\n".join(lines)


def test_blocks_keep_their_line_numbers():
    assert python_of("text\n```python\na = 1\n```\n```sh\nls\n```\n```python\nb\n```").split("\n") == [
        *("", "", "a = 1", "", "", "", "", "", "b", "")
    ]


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_python_examples_of_a_page_run(page):
    torch.manual_seed(0)
    exec(compile(python_of(EXAMPLES[page]), str(ROOT / page), "exec"), {})


def test_the_loop_on_the_page_of_the_monitor_trains():
    """From chance, which is a loss of 2.3."""
    torch.manual_seed(0)
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGES["docs/monitor.md"], flags=re.DOTALL)[1], names)
    with torch.no_grad():
        assert names["loss"](names["model"](names["x"]), names["y"]) < 1.5


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_point_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
