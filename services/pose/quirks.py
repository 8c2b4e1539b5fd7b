"""Where the two released pose extractors differ from each other, or from what they mean: one named setting each.

`wan2gp` does as deepbeepmeep/Wan2GP 8681e9f, `official` as zai-org/SCAIL-Pose 830da75; `recommended` is the default.
For a clip in which every frame shows one person all three draw the same, but for the size of the hands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Strokes:
    """How thick things are drawn: a choice of the bundle, since small pictures need other strokes than large ones.

    Attributes:
        capsule_radius_mm: half the thickness of a limb.
        head_radius_px: of the discs on nose, eyes and ears, and half the thickness of the links between them.
        dot_radius_px: of the points of hands and faces, and the thickness of fingers (1 at least, 2 at most); None: by
            the size of the picture.

    The defaults are those of both references.
    """

    capsule_radius_mm: float = 21.5
    head_radius_px: int = 4
    dot_radius_px: int | None = None

    def dot_radius(self, height: int, width: int) -> int:
        """`dot_radius_px`, or that of the references: 1, and 2 where the shorter side has 600 pixels or more."""
        if self.dot_radius_px is not None:
            return self.dot_radius_px
        return min(max(min(height, width) // 300, 1), 2)


REFERENCE_STROKES = Strokes()


@dataclass(frozen=True)
class PoseQuirks:
    """Settings of the pose frames; the defaults are the recommended ones, each with its reason."""

    hands: Literal["own", "stacked"] = "own"
    """Whose hands a person gets. The keypoint stage stacks all left hands above all right hands; the references read
    rows 2i and 2i + 1 of that for person i ("stacked"), which are other people's as soon as two are in the frame.
    "own" takes rows i and n + i: the same for one person, and right for several."""

    draw_undetected: bool = False
    """Where no person was detected, keypoints are those of the whole picture as if it were one person. The references
    draw them. They are guesses without a body under them, so they are left out here."""

    scale_hands: bool = True
    """Whether aligned hands are scaled about their wrist as the body is. Added to the official extractor after a report
    of misplaced hands, absent in the other; hands that keep their size no longer fit the arms."""

    further_people: Literal["drawn", "omitted"] = "drawn"
    """People beyond the second: drawn with the second palette, or left out (the official extractor knows two palettes).
    The weights have seen two palettes only, so a third is not offered."""

    face_scale_points: Literal["visible", "all"] = "visible"
    """Face points of which the face scale is the ratio. Invisible points lie at (-1, -1); the references include them,
    which makes the ratio depend on how many there are rather than on the size of the faces."""

    face_scale_frame: Literal["aligned", "first"] = "aligned"
    """The driving frame whose face is compared: the one the camera was solved for, or always the first of the clip,
    which may show nobody."""

    unaligned_overlay: Literal["drawn", "everyone"] = "drawn"
    """Whose hands and face are drawn when one person is to be animated and the reference picture shows nobody: those of
    the one whose limbs are drawn, or everyone's as in the references."""


PRESETS: Mapping[str, PoseQuirks] = {
    "recommended": PoseQuirks(),
    "wan2gp": PoseQuirks(
        hands="stacked",
        draw_undetected=True,
        scale_hands=False,
        further_people="drawn",
        face_scale_points="all",
        face_scale_frame="first",
        unaligned_overlay="everyone",
    ),
    "official": PoseQuirks(
        hands="stacked",
        draw_undetected=True,
        scale_hands=True,
        further_people="omitted",
        face_scale_points="all",
        face_scale_frame="first",
        unaligned_overlay="everyone",
    ),
}
