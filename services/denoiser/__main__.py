"""`python -m services.denoiser`: the denoiser stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial
from typing import Literal

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.settings import serve_stage
from services.denoiser.service import DenoiserService


class DenoiserSettings(BaseSettings):
    """What the denoiser reads besides, as BUNRAKU_PRECISION and so on."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    precision: Literal["auto", "exact", "balanced"] = Field(
        default="auto", description="how the blocks compute; auto: balanced where there are kernels for it, else exact"
    )
    memory_mode: Literal["gpu_only", "hybrid", "cpu_only"] = Field(
        default="gpu_only", description="hybrid: blocks that do not fit into vram stay in host memory and are streamed"
    )
    vram: ByteSize | None = Field(
        default=None,
        description="of hybrid, as 4GiB: what the process may use; not set: what is free of vram_fraction of the device",
    )


if __name__ == "__main__":
    settings = DenoiserSettings()
    serve_stage(
        "denoiser",
        partial(
            DenoiserService, precision=settings.precision, memory_mode=settings.memory_mode, vram_bytes=settings.vram
        ),
    )
