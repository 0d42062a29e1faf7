"""The Python snippets of README and docs run, one after the other in one namespace, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "docs/compression.md", "docs/elements.md", "docs/kmeans.md", "docs/methods.md", "docs/qat.md",
    "docs/ranges.md", "docs/storage.md",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    assert snippets
    names: dict = {}
    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)


def test_readme_names_every_target():
    from phiquant.spec import TARGETS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in TARGETS:
        fmt, _, kind = name.partition(":")
        short = kind.removeprefix("int4")
        assert name in text or f"`{short}`" in text or f"`{kind}`" in text, f"{fmt}:{kind}"


def test_readme_names_every_command():
    from phiquant.cli.app import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"phiquant {name}" in text for name in COMMANDS)


def test_links_lead_somewhere():
    others = ("CONTRIBUTING.md", "benchmarks/README.md")
    docs = ("docs/architecture.md", "docs/convert.md", "docs/formats.md", "docs/receipt.md")
    for page in (*PAGES, *others, *docs):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            if "://" not in link:
                assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
