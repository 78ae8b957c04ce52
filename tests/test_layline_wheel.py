"""The wheel: builds from the tree, carries its data files, and works where it is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=environment.get("PWD", str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_and_works_elsewhere(tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in ("profiles/data", "reports/templates"):
        data = {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).iterdir()
            if path.is_file() and path.suffix != ".pyc"
        }
        assert data
        assert data <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/"))]
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    call(*pip, "--no-deps", "--target", str(site), str(wheel))
    code = (
        "import layline, profiles.presets; print(layline.__file__); "
        "print(profiles.presets.model_preset('llama-3-8b').num_parameters)"
    )
    where, parameters = call(
        sys.executable, "-c", code, PYTHONPATH=str(site), PWD=str(tmp_path)
    ).split()
    assert where.startswith(str(site))
    assert int(parameters) == 8_030_261_248
