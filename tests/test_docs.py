"""The site says all, and leads nowhere that is not there."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from test_surface import MODULES, module, names_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_extensions"))

from api_tables import expanded, FENCE, listed  # noqa: E402, I001

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = {path.name: path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md"))}
ON_PAGES = [(where, name) for text in API.values() for where, name, _ in listed(text)]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_on_a_page_of_the_api(name):
    """Modules are the pages themselves."""
    where = f"lowrank_optax.{name}".rstrip(".")
    shown = {n for at, n in ON_PAGES if at == where}
    public = {n for n in names_of(name) if not inspect.ismodule(getattr(module(name), n))}
    assert not public - shown, f"put these of {where} on a page of docs/api"


def test_pages_of_the_api_list_what_there_is_and_once():
    assert len(set(ON_PAGES)) == len(ON_PAGES)
    for where, name in ON_PAGES:
        assert hasattr(importlib.import_module(where), name), f"{where}.{name}"


def test_fences_become_tables_and_entries():
    text = "```{api} lowrank_optax.inner\nAdam\nas_inner +members\n```"
    out = FENCE.sub(expanded, text)
    for line in ("   Adam", ".. autoclass:: Adam", ".. autofunction:: as_inner", "   :members:"):
        assert line in out.splitlines()


def anchors(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_one_version():
    import tomllib

    import lowrank_optax

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lowrank_optax.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
