"""The pinned environment, written down once and repeated without a slip."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def pins(lines):
    return {line.strip() for line in lines if re.match(r"^[A-Za-z0-9_.-]+==", line.strip())}


def test_environment_yml_holds_the_pins_of_requirements_txt():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pins(pip) == pins((ROOT / "requirements.txt").read_text().splitlines())


def test_every_declared_dependency_is_pinned():
    declared = re.search(r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL).group(1)
    pinned = {pin.split("==")[0] for pin in pins((ROOT / "requirements.txt").read_text().splitlines())}
    assert set(re.findall(r'"([A-Za-z0-9-]+)"', declared)) <= pinned
