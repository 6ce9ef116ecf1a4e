import importlib
from typing import Any

import pytest
from click.testing import CliRunner

from deploykit.cli import main


def test_ctrl_c_while_a_commands_module_is_imported_has_the_exit_code_of_every_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    result = CliRunner().invoke(main, ["predict", "model", "a text"])
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")
