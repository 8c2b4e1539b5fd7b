"""How an extraction decides: the settings of all its steps, by the name of a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.pose.clip import Fit
from services.pose.nlf.config import QUIRKS, NlfQuirks
from services.pose.persons.masks import BACKGROUNDS
from services.pose.quirks import PRESETS, PoseQuirks


@dataclass(frozen=True)
class Habits:
    """How an extraction decides.

    Attributes:
        pose, nlf: settings of the drawing and of the 3D estimator.
        follows: people are recognised from frame to frame, and bridged where missing; otherwise the best box of each
            frame is taken for the one person, and the largest boxes for several, as both released programs do.
        fit: how frames are brought to the size of the video.
        background: RGB levels behind one of several people, for the 3D estimator.
    """

    pose: PoseQuirks
    nlf: NlfQuirks
    follows: bool
    fit: Fit
    background: tuple[int, int, int]


HABITS: Mapping[str, Habits] = {
    "recommended": Habits(PRESETS["recommended"], QUIRKS["default"], True, "lanczos", BACKGROUNDS["official"]),
    "wan2gp": Habits(PRESETS["wan2gp"], QUIRKS["wan2gp"], False, "lanczos", BACKGROUNDS["wan2gp"]),
    "official": Habits(PRESETS["official"], QUIRKS["official"], False, "bicubic", BACKGROUNDS["official"]),
}
