"""Which versions and which commit a number comes from."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("moe-bitnet", "torch", "numpy")


def installed_versions(extra_packages: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of Python, of :data:`PACKAGES` and of ``extra_packages``; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *extra_packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def current_commit() -> str:
    """Return the short commit of this checkout, with ``-dirty`` after local changes; ``unknown`` outside of one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
