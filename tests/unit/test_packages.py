import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_of_the_sources_is_one_that_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    places = {".".join(file.parent.relative_to(ROOT / "src").parts) for file in (ROOT / "src").rglob("__init__.py")}
    places |= {
        ".".join(("millrace", *file.parent.relative_to(ROOT).parts))
        for file in (ROOT / "converters").rglob("__init__.py")
    }
    assert places <= set(listed)
