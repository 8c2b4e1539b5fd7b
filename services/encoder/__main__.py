"""`python -m services.encoder`: the encoder stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial

from pydantic import ByteSize, Field
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


if __name__ == "__main__":
    make_service = partial(EncoderService, vram_bytes=EncoderSettings().vram)  # type: ignore[abstract]  # no EncodeAudio yet
    serve_stage("encoder", make_service, max_concurrent=4)
