"""`python -m services.pose`: the pose stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.bundles import BundleError, load_bundle
from runtime.settings import StageSettings, serve_stage
from services.pose.clip import CLIPS_AT_A_TIME
from services.pose.people import COMPONENTS
from services.pose.service import PoseService


class PoseSettings(BaseSettings):
    """What the pose stage reads besides, as BUNRAKU_VRAM and so on."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    vram: ByteSize | None = Field(
        default=None,
        description="as 3GiB: what the process may use of its GPU; where that is short, less of a clip is worked on at "
        "once; not set: there is no limit but vram_fraction",
    )


def finds_people() -> bool:
    """Whether the bundle has models for it: only then torch, which takes seconds to import, is asked for a device."""
    settings = StageSettings()  # type: ignore[call-arg]  # its fields come from the environment
    try:
        return bool(load_bundle(settings.bundle, settings.models).components.keys() & set(COMPONENTS))
    except BundleError:
        return False  # serve_stage says what is wrong with it


if __name__ == "__main__":
    serve_stage(
        "pose",
        partial(PoseService, vram_bytes=PoseSettings().vram),
        max_concurrent=CLIPS_AT_A_TIME,
        uses_torch=finds_people(),
    )
