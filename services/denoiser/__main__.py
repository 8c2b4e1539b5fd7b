"""`python -m services.denoiser`: the denoiser stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.settings import serve_stage
from services.denoiser.service import DenoiserService


class DenoiserSettings(BaseSettings):
    """What the denoiser reads besides; as BUNRAKU_PRECISION."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    precision: Literal["auto", "exact", "balanced"] = Field(
        default="auto", description="how the blocks compute; auto: balanced where there are kernels for it, else exact"
    )


if __name__ == "__main__":
    serve_stage("denoiser", partial(DenoiserService, precision=DenoiserSettings().precision))
