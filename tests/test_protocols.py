"""The protocols' files, and which rows may stand beside each other."""

import json
from pathlib import Path

import pytest

from onestep.metrics import PROTOCOLS, compare
from onestep.metrics.compare import differences
from onestep.metrics.measure import METRICS
from onestep.metrics.protocol import FOLDER, read_protocols
from onestep.metrics.published import PUBLISHED, any_protocol

NAMES = [
    *("edm-cifar10-50k", "adm-imagenet64-50k", "adm-imagenet256-50k", "coco2014-30k-256", "dmd2-coco10k"),
    *("coco2017-5k-512", "mjhq-5k", "fashion-10k", "digits-5k", "digits-1797", "emoji-2k"),
]
RECORDED = {
    "name": "digits-1797",
    "metric": "FD",
    "dataset": "the digits of scikit-learn, all 1,797 images of 8x8",
    "count": 1797,
    "classes": 10,
    "shape": [1, 8, 8],
    "resize": "none; quantised to 8 bits, then scaled to [0, 16]",
    "extractor": "the 64 pixels; the class is that of the nearest real image",
    "dimensions": 64,
    "assets": "digits_data",
    "first_seed": 0,
    "levels": 16,
}
"""As rows have it that were written before protocols were files."""


def row(**entries):
    return {"protocol": dict(RECORDED), "FD": 1.0, "export": "a", "count": 1797, "extractor_sha256": "e", **entries}


def test_every_protocol_has_a_file_of_its_name():
    assert sorted(NAMES) == sorted([*PROTOCOLS, *PUBLISHED])
    assert all(fields["name"] == name for name, fields in read_protocols().items())
    assert (Path(__file__).parent.parent / "eval" / "protocols").resolve() == FOLDER.resolve()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_protocol_says_where_all_comes_from(name):
    protocol = PUBLISHED[name]
    assert set(protocol.metrics) <= set(METRICS) and protocol.source and protocol.paper and protocol.facts
    assert protocol.embedded or (protocol.reference and protocol.reference_from)
    assert bool(protocol.prompts) != bool(protocol.classes)
    assert protocol.prompts_sha256 == "" or len(protocol.prompts_sha256) == 64
    assert json.loads(json.dumps(protocol.details()))["count"] == protocol.count


def test_recorded_protocols_are_what_they_were():
    assert json.loads(json.dumps(PROTOCOLS["digits-1797"].details())) == RECORDED
    assert PROTOCOLS["digits-5k"].count == 5000 and PROTOCOLS["fashion-10k"].shape == (1, 32, 32)


def test_edm_takes_the_least_of_three():
    protocol = PUBLISHED["edm-cifar10-50k"]
    assert (protocol.repeats, protocol.count, protocol.first_seed) == (3, 50_000, 0)


def test_emoji_has_as_many_images_as_there_are_pictures():
    from onestep.metrics.prompts import captioned

    pictures, captions = captioned("emoji")
    assert len(pictures) == len(captions) == PUBLISHED["emoji-2k"].count


def test_unknown_protocols_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean --protocol coco2017-5k-512"):
        any_protocol("coco2017-5k")


def test_rows_of_one_protocol_may_be_compared():
    today = {**row(), "protocol": PROTOCOLS["digits-1797"].details()}  # with a tuple where a stored row has a list
    measured = row(protocol={**RECORDED, "manifold": {"precision_recall_k": 3}}, precision=0.5, export="b", steps=4)
    old = {key: value for key, value in row().items() if key != "extractor_sha256"}
    compare([row(), today, measured, old])
    compare([row()])
    compare([])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            row(protocol=PROTOCOLS["digits-5k"].details()),
            "protocol.name: digits-1797 and digits-5k; protocol.count: 1797 and 5000",
        ),
        (row(count=100), "count: 1797 and 100"),
        (row(extractor_sha256="f"), "extractor_sha256: e and f"),
        ({"FD": 1.0, "export": "b", "count": 1797}, "protocol.name: digits-1797 and none"),
        (row(protocol={**RECORDED, "shape": [3, 8, 8]}), r"protocol.shape: \[1, 8, 8\] and \[3, 8, 8\]"),
    ],
)
def test_rows_of_different_protocols_are_refused_by_name(other, difference):
    with pytest.raises(ValueError, match=difference):
        compare([row(), row(), other])


def test_rows_without_a_protocol_are_compared_by_what_they_depend_on():
    a = {"FID": 3.0, "mode": "clean", "count": 50_000, "extractor_sha256": "e", "reference_sha256": "r", "size": 256}
    assert differences(a, dict(a, FID=4.0, steps=2)) == []
    for name, value in (("mode", "legacy_tensorflow"), ("reference_sha256", "s"), ("size", 512), ("repeats", 3)):
        assert differences(dict(a, repeats=1), dict(a, repeats=1) | {name: value}) == [
            f"{name}: {dict(a, repeats=1)[name]} and {value}"
        ]


def test_what_explains_a_protocol_is_no_difference():
    details = PUBLISHED["coco2014-30k-256"].details()
    assert differences({"protocol": details}, {"protocol": details | {"facts": "said in other words"}}) == []
