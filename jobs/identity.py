"""A check that no other distribution installs a package named `jobs`, `tokenizer` or `pipelines`."""

from __future__ import annotations

import importlib.util
from importlib.metadata import packages_distributions
from pathlib import Path

DISTRIBUTION = "semantic-id-pipeline"
PACKAGES = ("jobs", "tokenizer", "pipelines")


class IntruderError(RuntimeError):
    """Another distribution has a package of our name."""


def check_packages() -> None:
    """Check that `tokenizer`, `jobs` and `pipelines` are the packages of this project.

    Raises:
        IntruderError: another distribution installs one of the names, or the import finds another folder.
    """
    home = Path(__file__).parent.parent
    owners = packages_distributions()
    for package in PACKAGES:
        others = sorted(set(owners.get(package, [])) - {DISTRIBUTION})
        if others:
            raise IntruderError(
                f"distribution {others[0]!r} installs a package named {package!r}, which is ours ({DISTRIBUTION}); "
                f"expected one owner. Uninstall it (pip uninstall {others[0]}), then install {DISTRIBUTION} again, or "
                "use an environment of its own"
            )
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin or Path(spec.origin).parent.parent != home:
            origin = "nothing" if spec is None else spec.origin
            raise IntruderError(
                f"package {package!r} is found at {origin}; expected it beside `jobs`. Check PYTHONPATH and the "
                "current folder"
            )
