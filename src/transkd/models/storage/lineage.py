"""Licence lineage: origins and licences of a network's code and weights, stored in every weights file."""

import re
from collections.abc import Iterable

from transkd.errors import UserError

__all__ = [
    "CODE",
    "RANDOM",
    "Lineage",
    "as_teacher",
    "check_license_policy",
    "describe_lineage",
    "is_commercial",
    "merge_lineage",
]

Lineage = list[dict[str, str | None]]
"""Entries ``{"part": "code" | "weights" | "teacher", "source": …, "license": …}``; None for an unknown licence."""

CODE: dict[str, str | None] = {"part": "code", "source": "transkd", "license": "Apache-2.0"}
RANDOM: dict[str, str | None] = {"part": "weights", "source": "random initialisation", "license": "none needed"}

# Licences that allow commercial use, in the spelling of model hubs.
PERMISSIVE = re.compile(
    r"(apache|mit( license)?$|bsd|isc|cc0|cc-by-(sa-)?\d|unlicense$|openrail|[al]?gpl|mpl|zlib|wtfpl|cdla|none needed)",
    re.I,
)
NON_COMMERCIAL = re.compile(r"(non[- ]?commercial|(^|[^a-z])nc([^a-z]|$)|nvidia|research|academic)", re.I)


def is_commercial(license: str | None) -> bool | None:
    """Whether a licence allows commercial use; None if that is not known.

    Example:
        >>> is_commercial("apache-2.0"), is_commercial("cc-by-nc-4.0"), is_commercial("other")
        (True, False, None)
    """
    if license is None:
        return None
    if NON_COMMERCIAL.search(license):
        return False
    return True if PERMISSIVE.match(license) else None


def describe_lineage(lineage: Lineage) -> str:
    """Format a lineage as one line for logs and model cards.

    Example:
        >>> describe_lineage([CODE]), describe_lineage([])
        ('code: transkd (Apache-2.0)', 'origin not stated')
    """
    entries = [f"{entry['part']}: {entry['source']} ({entry['license'] or 'licence unknown'})" for entry in lineage]
    return "; ".join(entries) or "origin not stated"


def merge_lineage(*lineages: Iterable[dict[str, str | None]]) -> Lineage:
    """Concatenate lineages without duplicates."""
    merged: Lineage = []
    for lineage in lineages:
        for entry in lineage:
            if entry not in merged:
                merged.append(entry)
    return merged


def as_teacher(lineage: Lineage) -> Lineage:
    """Convert a teacher's lineage to entries of its student's lineage."""
    return [{**entry, "part": "teacher"} for entry in lineage if entry["part"] != "code"]


def check_license_policy(lineage: Lineage, policy: str, who: str) -> None:
    """Check a network's lineage against ``license_policy``.

    Args:
        lineage: lineage of the network.
        policy: "any", or "commercial", which accepts only licences that are known to allow commercial use.
        who: name of the network for the message.

    Raises:
        UserError: a licence does not allow commercial use or is unknown, or the policy is unknown.
    """
    if policy not in ("any", "commercial"):
        raise UserError(f"license_policy is 'any' or 'commercial', got {policy!r}")
    if policy == "any":
        return
    refused = [entry for entry in lineage if not is_commercial(entry["license"])]
    if refused:
        raise UserError(
            f"license_policy=commercial refuses {who}: {describe_lineage(refused)}. Start from weights that allow "
            "commercial use, or state the licence of a file: license=…, in training student.license=… or "
            "teacher.license=…"
        )
