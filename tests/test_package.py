"""The package as a whole: light to import, its names where they belong."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import tracedensity as td

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformer_lens", "transformers", "plotly", "pandas", "numpy")
# Some modules are run, not imported.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(td.__path__, "tracedensity.")
    if not module.name.endswith("__main__")
]


MEANT = ("plot", "study", "tasks")  # modules that are public as such


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, tracedensity; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_listing_the_bundled_models_imports_nothing_heavy():
    code = (
        "import sys; from tracedensity.loading import bundled_models; bundled_models();"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_every_public_name_resolves():
    for name in td.__all__:
        assert isinstance(getattr(td, name), ModuleType) == (name in MEANT), name
    assert set(td.__all__) <= set(dir(td))


def test_no_module_takes_the_place_of_a_public_name():
    for module in MODULES:
        import_module(module)
    for name in td.__all__:
        assert isinstance(getattr(td, name), ModuleType) == (name in MEANT), name


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'densty'; it has .*density"):
        _ = td.densty


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert td.__version__ == project["project"]["version"]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("[dt]*/*.md")]), ids=lambda page: page.name)
def test_links_between_our_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_package_is_its_command_line():
    done = subprocess.run([sys.executable, "-m", "tracedensity", "--help"], capture_output=True, text=True, check=True)
    assert "density" in done.stdout and "refine" in done.stdout
