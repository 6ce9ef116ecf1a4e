"""The picture of the layers in docs/how-it-works.md shows those of the import contract in pyproject.toml."""

from __future__ import annotations

import re
from itertools import pairwise

from paths import ROOT


def test_the_picture_has_the_layers_in_the_order_of_the_contract() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    picture = page.split("flowchart TB\n")[1].split("```")[0]
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\nlayers = [\n")[1].split("\n]")[0]
    layers = [re.findall(r"deploykit\.([\w.]+)", line) for line in contract.splitlines()]
    height = {name.replace("tasks.", "tasks/"): i for i, names in enumerate(layers) for name in names}
    height["tasks/NAME"] = height["tasks/translation"]

    chains = [re.split(r" --> ", line.strip()) for line in picture.splitlines()]
    assert all(first[-1].split("[")[0] == second[0] for first, second in pairwise(chains)), "one chain"
    boxes = [chains[0][0], *(box for chain in chains for box in chain[1:])]
    shown = []
    for box in boxes:
        label = box.split("[")[1].strip('"]').split(":")[0] if "[" in box else box
        (its_height,) = {height[name] for name in label.split(" · ")}
        shown.append(its_height)
    assert shown == sorted(set(shown)), "from top to bottom"
    tools = {name for names in layers[: height["runtime"] + 1] for name in names if len(names) > 1 and "." not in name}
    assert all(name in picture for name in tools), "none of those that share a layer is missing"
