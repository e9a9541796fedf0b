"""Meanings of road signs: the sign names of the sprite source, grouped by regular expressions."""

from __future__ import annotations

import re

# The first pattern that fits a name decides; "" leaves the sign out, since it belongs to two groups or to none.
GROUPS: tuple[tuple[str, str], ...] = (
    (
        "",
        r"texts?$|street-name|^complementary--(except|when|including|distance|time)|--end-of-(?!.*speed)|minimum-speed",
    ),
    ("the end of a speed limit", r"--end-of-.*speed"),
    ("a speed limit", r"(maximum|night|truck|advisory-maximum)-speed-limit|speed-limit-zone"),
    (
        "animals on the road",
        r"animals$|(bear|camel|elephant|emu|frog|horse|kangaloo|kiwi|koala|monkey|panda|rabbit|raccoon|wombat|equestrians)"
        r"-crossing",
    ),
    ("", r"railroad|trams?\b|train|light-rail|rails$|subway"),
    ("", r"no-(parking|stopping)|tow-away"),
    ("", r"parking|park-and-ride"),
    ("", r"no-overtaking|no-passing|do-not-pass"),
    ("", r"no-.*turn|no-straight|no-go-straight"),
    ("vehicles forbidden", r"--no-(?!pedestrians|horn|hawkers|cargo|passenger|lane|skiing|learner|equestrians|two)"),
    (
        "",
        r"pedestrian|children|playground|school|crosswalk|trail-crossing|disabled-persons-crossing|hiking|stairs"
        r"|living-street",
    ),
    ("bicycles", r"bicycl|cycl|bike"),
    ("", r"roadworks|construction|flaggers|road-works|dead-end|steep|descent|ascent"),
    (
        "",
        r"bump|dip$|uneven|slippery|icy|pavement|loose|gravel|soft-|ruts|fresh-oil|sand|snow-|snowy|rainy",
    ),
    ("", r"(weight|height|width|length|axle)-(limit|restriction)|low-ground-clearance"),
    (
        "",
        r"^warning--.*(curve|hairpin|winding|sharp-turn|horizontal-alignment|loop|turn-first)|^warning--turn-(left|right)",
    ),
    (
        "a lane ending or narrowing",
        r"^warning--.*(narrow|lane-closed|closed-lane|merge|merging|widens|added-lane|divided-highway|reserved-lane"
        r"|occupied-lanes)",
    ),
    ("a junction", r"crossroads|junction|offset-roads|skewed-t|y-roads|t-roads|side-roads|warning--roundabout"),
    ("which lane to use", r"(dual|triple)-lanes|lane-control"),
    (
        "a direction to follow",
        r"^(regulatory|complementary|information)--(go-|turn-|keep-|pass-|one-way|u-turn|roundabout|circular|one-direction"
        r"|detour-)|chevron",
    ),
    (
        "services for travellers",
        r"airport|camp|gas-station|hospital|food|lodging|telephone|picnic|rest-area|emergency-facility|charging|wireless"
        r"|touris|sanitary|information--(litter|recycle|toll|flight|disabled)",
    ),
)


def sign_group(name: str) -> str:
    """The meaning of a sign by its name without the variant number; "" when it is left out.

    >>> sign_group("warning--koala-crossing")
    'animals on the road'
    """
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "")


def sign_item(name: str) -> str:
    """The name by which renderings of one sign are held together: mirror images are one sign, variants too.

    >>> sign_item("warning--curve-left--g2"), sign_item("warning--curve-right--g1")
    ('curve-side', 'curve-side')
    """
    bare = re.sub(r"--g\d+$", "", name).split("--", 1)[1]
    return re.sub(r"\b(left|right)\b", "side", bare)
