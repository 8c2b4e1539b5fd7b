"""`python -m services.vae`: the VAE stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial
from typing import Literal

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.settings import serve_stage
from services.vae.plan import CLIPS_AT_A_TIME
from services.vae.service import VaeService


class VaeSettings(BaseSettings):
    """What the VAE stage reads besides, as BUNRAKU_PRECISION and so on."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    precision: Literal["auto", "exact", "balanced", "fast"] = Field(
        default="auto", description="exact: float32; all others: float16 on a GPU"
    )
    vram: ByteSize | None = Field(
        default=None,
        description="as 4GiB: what the process may use, of RAM on a CPU; frames that need more are computed in tiles; "
        "not set: on a GPU what is free of vram_fraction of it, on a CPU there is no limit",
    )


if __name__ == "__main__":
    settings = VaeSettings()
    serve_stage(
        "vae",
        partial(VaeService, precision=settings.precision, vram_bytes=settings.vram),
        max_concurrent=CLIPS_AT_A_TIME,
    )
