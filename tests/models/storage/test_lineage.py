import pytest

from transkd.errors import UserError
from transkd.models.storage.lineage import (
    CODE,
    RANDOM,
    as_teacher,
    check_license_policy,
    describe_lineage,
    is_commercial,
    merge_lineage,
)

LICENSES = {
    # as the Hugging Face hub and timm spell them
    "apache-2.0": True,
    "mit": True,
    "bsd-2-clause": True,
    "bsd-3-clause": True,
    "isc": True,
    "cc0-1.0": True,
    "cc-by-4.0": True,
    "cc-by-sa-4.0": True,
    "gpl-3.0": True,
    "lgpl-2.1": True,
    "agpl-3.0": True,
    "mpl-2.0": True,
    "zlib": True,
    "wtfpl": True,
    "unlicense": True,
    "openrail": True,
    "openrail++": True,
    "cdla-permissive-2.0": True,
    "cc-by-nc-2.0": False,
    "cc-by-nc-4.0": False,
    "cc-by-nc-sa-4.0": False,
    "cc-by-nc-nd-4.0": False,
    "fair-noncommercial-research-license": False,
    "intel-research": False,
    "cc-by-nd-4.0": None,
    "cc": None,
    "other": None,
    "unknown": None,
    "bigscience-bloom-rail-1.0": None,
    "llama3.2": None,
    "apple-amlr": None,
    # as people write them
    "MIT": True,
    "MIT License": True,
    "Apache License 2.0": True,
    "BSD 3-Clause": True,
    "CC-BY-NC-4.0": False,
    "CC BY-NC 4.0": False,
    "CC BY-NC-SA 4.0": False,
    "cc_by_nc_4.0": False,
    "NVIDIA Source Code License for SegFormer (non-commercial)": False,
    "nvidia-open-model-license": False,  # errs on the safe side
    "non-commercial": False,
    "Noncommercial": False,
    "non commercial use only": False,
    "PolyForm-Noncommercial-1.0.0": False,
    "research-only": False,
    "for research purposes": False,
    "apache-2.0 for non-commercial use": False,
    "GPL for non commercial use": False,
    "apache-2.0, academic use only": False,
    "UNLICENSED": None,  # in package registries: all rights reserved
    "limited": None,
    "permit": None,
    "mitigated": None,
    "commercial": None,
    "proprietary": None,
    "": None,
    "none needed": True,
    None: None,
}
OWN = {"part": "weights", "source": "own.pth", "license": None}
FREE = {"part": "weights", "source": "timm://resnet18", "license": "apache-2.0"}
NVIDIA = {"part": "weights", "source": "b2.pth", "license": "NVIDIA Source Code License for SegFormer (non-commercial)"}


@pytest.mark.parametrize(("license", "commercial"), LICENSES.items(), ids=str)
def test_commercial_use(license, commercial):
    assert is_commercial(license) is commercial


def test_each_entry_once_in_order():
    assert merge_lineage([CODE, FREE], [CODE, NVIDIA, FREE], [RANDOM]) == [CODE, FREE, NVIDIA, RANDOM]
    assert merge_lineage([OWN, FREE, OWN]) == [OWN, FREE]
    assert merge_lineage([CODE], [RANDOM], [RANDOM, RANDOM]) == [CODE, RANDOM]
    assert merge_lineage() == []


def test_entries_that_differ_in_anything_stay_apart():
    others = [{**OWN, "license": "mit"}, {**OWN, "source": "other.pth"}, {**OWN, "part": "teacher"}]
    assert merge_lineage([OWN], others) == [OWN, *others]


def test_merging_changes_none_of_its_inputs():
    first, second = [CODE], [FREE]
    merge_lineage(first, second).append(OWN)
    assert (first, second) == ([CODE], [FREE])


def test_a_teachers_lineage_in_its_student():
    assert as_teacher([CODE, FREE, OWN]) == [{**FREE, "part": "teacher"}, {**OWN, "part": "teacher"}]
    assert as_teacher(as_teacher([FREE])) == [{**FREE, "part": "teacher"}]  # the teacher's teacher
    assert (CODE["part"], FREE["part"], OWN["part"]) == ("code", "weights", "weights")


def test_description():
    assert describe_lineage([CODE, FREE, OWN]) == (
        "code: transkd (Apache-2.0); weights: timm://resnet18 (apache-2.0); weights: own.pth (licence unknown)"
    )
    assert describe_lineage([{**OWN, "license": ""}]).endswith("(licence unknown)")


@pytest.mark.parametrize("lineage", [[], [CODE, RANDOM], [CODE, FREE], [OWN], [NVIDIA]], ids=str)
def test_any_takes_all(lineage):
    check_license_policy(lineage, "any", "the student")


@pytest.mark.parametrize("lineage", [[], [CODE, RANDOM], [CODE, FREE, {**FREE, "part": "teacher"}]], ids=str)
def test_commercial_takes_what_allows_it(lineage):
    check_license_policy(lineage, "commercial", "the student")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (OWN, r"own\.pth \(licence unknown\)"),
        ({**OWN, "license": "other"}, r"own\.pth \(other\)"),
        (NVIDIA, r"b2\.pth \(NVIDIA"),
        ({**NVIDIA, "part": "teacher"}, r"teacher: b2\.pth \(NVIDIA"),
        ({"part": "code", "source": "theirs", "license": "cc-by-nc-4.0"}, r"code: theirs \(cc-by-nc"),
    ],
)
def test_commercial_refuses_what_forbids_it_or_says_nothing(bad, named):
    message = f"license_policy=commercial refuses the student segformer_b2: .*{named}"
    with pytest.raises(UserError, match=message) as caught:
        check_license_policy([CODE, FREE, bad], "commercial", "the student segformer_b2")
    assert "timm://resnet18" not in str(caught.value)  # what is in order is not named
    assert "\n" not in str(caught.value)


def test_commercial_names_all_that_it_refuses():
    with pytest.raises(UserError, match=r"own\.pth.*b2\.pth"):
        check_license_policy([OWN, NVIDIA], "commercial", "the teacher")


@pytest.mark.parametrize("policy", ["comercial", "Commercial", "", None])
def test_unknown_policies_are_refused_whatever_the_lineage(policy):
    with pytest.raises(UserError, match=f"license_policy is 'any' or 'commercial', got {policy!r}"):
        check_license_policy([], policy, "the student")
