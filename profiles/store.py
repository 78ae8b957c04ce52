"""This machine's own profile, kept in the user's cache so that it is measured once."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from profiles.errors import InvalidInputError
from profiles.files import load
from profiles.profile import PROFILE_SCHEMA_VERSION, Profile

FIX = "measure it again with `layline profile`"


def load_profile(path: Path) -> Profile:
    """Return the profile in `path`.

    Raises InvalidInputError for a file that is missing, no profile, or of another schema.
    """
    profile = load(Profile, path, "profile made by `layline profile`", FIX)
    if profile.schema_version != PROFILE_SCHEMA_VERSION:
        raise InvalidInputError(
            [
                f"{path}: schema_version is {profile.schema_version}; "
                f"this version reads {PROFILE_SCHEMA_VERSION}; {FIX}"
            ]
        )
    return profile


def stored_profile_path(num_ranks: int, device_kind: str) -> Path:
    """Return where the profile of `num_ranks` ranks of this machine is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "layline" / f"profile-{num_ranks}-{device_kind}-ranks.json"


def stored_profile(num_ranks: int, device_kind: str) -> Profile | None:
    """Return the kept profile, or None if there is none that holds for what is installed now."""
    path = stored_profile_path(num_ranks, device_kind)
    try:
        profile = load_profile(path)
        is_current = profile.versions["torch"].split("+")[0] == version("torch").split("+")[0]
    except (InvalidInputError, PackageNotFoundError, KeyError):
        return None
    return profile if is_current else None
