"""The kept profile of this machine: read again while it holds, measured anew when it does not."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("torch")

from profiles.files import canonical_json, write_text
from profiles.machine import cpu_name, driver_version
from profiles.profile import Profile
from profiles.store import make_room, stored_profile, stored_profile_path
from tests.machine import made_up_profile


def of_this_machine() -> Profile:
    made_up = made_up_profile(num_ranks=2)
    device = replace(made_up.device, name=cpu_name(), driver=driver_version("cpu"))
    return replace(made_up, device=device, versions={"torch": version("torch")})


def kept(profile: Profile) -> Profile | None:
    path = stored_profile_path(2, "cpu")
    make_room(path)
    write_text(path, canonical_json(profile))
    return stored_profile(2, "cpu")


def test_a_kept_profile_holds_for_this_machine_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = of_this_machine()
    assert kept(profile) == profile
    for device in (
        replace(profile.device, driver="another kernel"),
        replace(profile.device, name="another CPU"),
    ):
        assert kept(replace(profile, device=device)) is None
    assert kept(replace(profile, versions={"torch": "2.0.0"})) is None
    assert kept(replace(profile, schema_version=1)) is None
