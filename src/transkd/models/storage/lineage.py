"""Licence lineage: where a network's code and weights come from, kept in every file of weights."""

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
"""Entries ``{"part": "code" | "weights" | "teacher", "source": …, "license": … or None where nobody says}``."""

CODE: dict[str, str | None] = {"part": "code", "source": "transkd", "license": "Apache-2.0"}
RANDOM: dict[str, str | None] = {"part": "weights", "source": "random initialisation", "license": "none needed"}

# Licences that allow commercial use, as model hubs spell them.
PERMISSIVE = re.compile(
    r"(apache|mit( license)?$|bsd|isc|cc0|cc-by-(sa-)?\d|unlicense$|openrail|[al]?gpl|mpl|zlib|wtfpl|cdla|none needed)",
    re.I,
)
NON_COMMERCIAL = re.compile(r"(non[- ]?commercial|(^|[^a-z])nc([^a-z]|$)|nvidia|research|academic)", re.I)


def is_commercial(license: str | None) -> bool | None:
    """Whether a licence allows commercial use; None where it is not known.

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
    """One line, for logs and model cards."""
    return "; ".join(
        f"{entry['part']}: {entry['source']} ({entry['license'] or 'licence unknown'})" for entry in lineage
    )


def merge_lineage(*lineages: Iterable[dict[str, str | None]]) -> Lineage:
    """Join lineages, each entry once, in order."""
    merged: Lineage = []
    for lineage in lineages:
        for entry in lineage:
            if entry not in merged:
                merged.append(entry)
    return merged


def as_teacher(lineage: Lineage) -> Lineage:
    """What a teacher's lineage is in its student's: where the knowledge comes from."""
    return [{**entry, "part": "teacher"} for entry in lineage if entry["part"] != "code"]


def check_license_policy(lineage: Lineage, policy: str, who: str) -> None:
    """Hold a network's lineage against ``license_policy``.

    Args:
        lineage: of a network.
        policy: "any", or "commercial", which takes only what is known to allow commercial use.
        who: the network, for the message.

    Raises:
        UserError: some part does not allow commercial use or nobody says under which licence it stands; or there
            is no such policy.
    """
    if policy not in ("any", "commercial"):
        raise UserError(f"license_policy is 'any' or 'commercial', got {policy!r}")
    if policy == "any":
        return
    refused = [entry for entry in lineage if not is_commercial(entry["license"])]
    if refused:
        raise UserError(
            f"license_policy=commercial refuses {who}: {describe_lineage(refused)}. Start from weights that allow "
            "commercial use, or say under which licence a file stands: license=…, in training student.license=… or "
            "teacher.license=…"
        )
