"""`python -m services.encoder`: the encoder stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial
from pathlib import Path
from typing import Self

from pydantic import ByteSize, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.settings import serve_stage
from services.encoder.service import EncoderService


class EncoderSettings(BaseSettings):
    """What the encoder stage reads besides, as BUNRAKU_VRAM and so on."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    vram: ByteSize | None = Field(
        default=None,
        description="as 4GiB: what the process may use of its GPU; layers that need more stay in host memory and are "
        "streamed; not set: there is no limit but vram_fraction",
    )
    offload_folder: Path | None = Field(
        default=None,
        description="with vram: directory for the layers that are streamed, which are read anew for each prompt; "
        "not set: they wait in host memory",
    )

    @model_validator(mode="after")
    def _has_a_use_for_the_folder(self) -> Self:
        if self.offload_folder is not None and self.vram is None:
            raise ValueError("offload_folder needs vram")
        return self


if __name__ == "__main__":
    settings = EncoderSettings()
    make_service = partial(
        EncoderService,  # type: ignore[abstract]  # no EncodeAudio yet
        vram_bytes=settings.vram,
        offload_folder=settings.offload_folder,
    )
    serve_stage("encoder", make_service, max_concurrent=4)
