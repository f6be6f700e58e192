"""The README says what the code does."""

import re
from pathlib import Path

from curvlab.fisher import STRUCTURES, of_theory
from curvlab.rows.loss import LOSSES
from curvlab.rows.modules import supported_layers

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_examples_run(capsys) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert code.count("\n") > 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(structure in printed for structure in of_theory())


def test_the_table_of_structures_is_the_registry() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert dict(rows) == {key: structure.summary for key, structure in STRUCTURES.items()}


def test_supported_layers_and_losses_are_named() -> None:
    for name in (*supported_layers(), *(loss.__name__ for loss in LOSSES)):
        assert f"`{name}`" in README
