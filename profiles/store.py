"""This machine's own profile, kept in the user's cache so that it is measured once."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from profiles.errors import InvalidInputError
from profiles.files import check_writable, from_plain, read_json
from profiles.machine import cpu_name, driver_version
from profiles.profile import PROFILE_SCHEMA_VERSION, Profile
from profiles.validity import errors

FIX = "measure it again with `layline profile`"
_MOST_LINES = 20
KEEP = (
    "set XDG_CACHE_HOME to a folder that can be written, or name a file made by "
    "`layline profile -o FILE` as profile in the job"
)


def load_profile(path: Path) -> Profile:
    """Return the profile in `path`.

    Raises InvalidInputError for a file that is missing, no profile, of another schema, or with
    values that no machine can have measured (`profiles.validity`).
    """
    data = read_json(path, "profile made by `layline profile`")
    # The version is told first: a file of another one has other keys.
    if isinstance(data, dict) and data.get("schema_version", 0) != PROFILE_SCHEMA_VERSION:
        found = json.dumps(data.get("schema_version", "missing"))[:60]
        raise InvalidInputError(
            [
                f"{path}: schema_version is {found}; "
                f"this version reads {PROFILE_SCHEMA_VERSION}; {FIX}"
            ]
        )
    profile = from_plain(Profile, data, str(path), FIX)
    if wrong := errors(profile):
        lines = [f"{path}: {each.where}: {each.what}; {FIX}" for each in wrong[:_MOST_LINES]]
        if len(wrong) > _MOST_LINES:
            lines.append(f"{path}: and {len(wrong) - _MOST_LINES} more like these")
        raise InvalidInputError(lines)
    return profile


def stored_profile_path(num_ranks: int, device_kind: str) -> Path:
    """Return where the profile of `num_ranks` ranks of this machine is kept.

    Raises InvalidInputError for a user without a home folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise InvalidInputError([f"there is no home folder to keep a profile in; {KEEP}"]) from None
    return cache / "layline" / f"profile-{num_ranks}-{device_kind}-ranks.json"


def make_room(path: Path) -> None:
    """Make the folder of `path`, a stored profile; before a measurement that takes a minute.

    Raises InvalidInputError where it cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except (OSError, InvalidInputError):
        raise InvalidInputError([f"{path}: a profile cannot be kept there; {KEEP}"]) from None


def stored_profile(num_ranks: int, device_kind: str) -> Profile | None:
    """Return the kept profile, or None if there is none that holds for what is installed now.

    Another torch, another driver, or a CPU of another name: then it is to be measured again.
    """
    try:
        profile = load_profile(stored_profile_path(num_ranks, device_kind))
        is_current = (
            profile.versions["torch"].split("+")[0] == version("torch").split("+")[0]
            and profile.device.driver == driver_version(device_kind)
            and (device_kind == "cuda" or profile.device.name == cpu_name())
        )
    except (InvalidInputError, PackageNotFoundError, KeyError):
        return None
    return profile if is_current else None
