"""The Python snippets of README and docs run, one after the other in one namespace, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "docs/compression.md", "docs/elements.md", "docs/kmeans.md", "docs/methods.md", "docs/perplexity.md",
    "docs/methods/activations.md", "docs/methods/transforms.md",
    "docs/qat.md", "docs/ranges.md", "docs/runtimes.md", "docs/storage.md", "docs/training-engines.md",
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


def test_readme_leads_to_a_page_for_every_format():
    from phiquant.targets import TARGETS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in {target.format for target in TARGETS.values()}:
        assert f"](docs/runtimes/{name}.md)" in text, name


def test_readme_names_every_command():
    from phiquant.cli.app import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"phiquant {name}" in text for name in COMMANDS)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
