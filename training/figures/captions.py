"""What is said of a clip: who moves how, and the effects, which nothing else tells."""

from __future__ import annotations

from training.figures.characters import CLOTHES, Characters
from training.figures.motion import CLASS_NAMES, Motions
from training.figures.scenes import HATS, Scenes

EFFECTS = ("snow", "night", "hat")
_CLOTHES, _HATS = tuple(CLOTHES), tuple(HATS)


def caption(characters: Characters, motions: Motions, scenes: Scenes, index: int) -> str:
    """A sentence about one clip of a batch, such as
    `a person in a red shirt and blue trousers walks at night with a yellow hat, snow is falling`."""
    if characters.motley[index]:
        who = "a person in motley"
    else:
        shirt, trousers = (_CLOTHES[int(worn[index])] for worn in (characters.shirt, characters.trousers))
        article = "an" if shirt == "orange" else "a"
        who = f"a person in {article} {shirt} shirt and {trousers} trousers"
    said = f"{who} {CLASS_NAMES[int(motions.kind[index])]}"
    if scenes.night[index]:
        said += " at night"
    if scenes.hat[index]:
        said += f" with a {_HATS[int(scenes.hat[index]) - 1]} hat"
    if scenes.snow[index]:
        said += ", snow is falling"
    return said


def captions(characters: Characters, motions: Motions, scenes: Scenes) -> list[str]:
    """Of a whole batch."""
    return [caption(characters, motions, scenes, index) for index in range(len(characters))]
