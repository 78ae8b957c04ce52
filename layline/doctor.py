"""`layline doctor`: what this machine is, what can be measured and run here, what is missing."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from profiles.files import plain
from profiles.machine import default_ranks, machine_facts
from profiles.store import stored_profile, stored_profile_path
from reports.words import size


def examine() -> dict[str, Any]:
    """Return the findings: the machine, the packages, what works, and what is missing and how."""
    facts = machine_facts()
    packages = {name: _version(name) for name in ("torch", "numpy", "matplotlib", "simpy")}
    num_ranks, device = default_ranks()
    has_torch, has_profile = bool(packages["torch"]), stored_profile(num_ranks, device) is not None
    missing = []
    if not has_torch:
        missing.append("PyTorch, for profile, run, bench and demo: pip install torch==2.13.0")
    if has_torch and not has_profile:
        missing.append(
            "a profile of this machine; `layline plan` measures it the first time, "
            "or now: layline demo"
        )
    return {
        "layline": version("layline") if _version("layline") else "not installed",
        "machine": plain(facts),
        "packages": packages,
        "num_ranks": num_ranks,
        "device": device,
        "profile": str(stored_profile_path(num_ranks, device)) if has_profile else "",
        "can": {
            "plan": True,
            "simulate": True,
            "report": True,
            "profile": has_torch,
            "run": has_torch,
        },
        "missing": missing,
    }


def findings_text(findings: dict[str, Any]) -> str:
    """Return the findings as lines."""
    lines = [f"layline {findings['layline']}"]
    machine = findings["machine"]
    lines += [
        f"  {machine['cpu_name']}, {machine['num_cores']} cores, {size(machine['memory_bytes'])}",
        f"  GPUs: {', '.join(gpu['name'] for gpu in machine['gpus']) or 'none'}",
        f"  Python {machine['python_version']} on {machine['system']}",
    ]
    lines += [f"  {name}: {found or 'missing'}" for name, found in findings["packages"].items()]
    lines.append(f"  ranks by default: {findings['num_ranks']} on {findings['device']}")
    lines.append(f"  profile: {findings['profile'] or 'none yet'}")
    works = [name for name, can in findings["can"].items() if can]
    lines.append(f"works here: {', '.join(works)}")
    lines += [f"missing: {item}" for item in findings["missing"]]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
