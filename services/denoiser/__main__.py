"""`python -m services.denoiser`: the denoiser stage as a process. Settings: runtime.settings.StageSettings and these."""

from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import AliasChoices, ByteSize, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.settings import serve_stage
from services.denoiser.group import Leader, Place, Worker, serve_leader, serve_worker
from services.denoiser.service import DenoiserService


class DenoiserSettings(BaseSettings):
    """What the denoiser reads besides, as BUNRAKU_PRECISION and so on."""

    model_config = SettingsConfigDict(env_prefix="BUNRAKU_", frozen=True)

    precision: Literal["auto", "exact", "balanced", "fast"] = Field(
        default="auto", description="how the blocks compute; auto: balanced where there are kernels for it, else exact"
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "sage", "flash3"] = Field(
        default="auto", description="how the video attends to itself; auto: as the precision has it"
    )
    memory_mode: Literal["gpu_only", "hybrid", "cpu_only"] = Field(
        default="gpu_only", description="hybrid: blocks that do not fit into vram stay in host memory and are streamed"
    )
    vram: ByteSize | None = Field(
        default=None,
        description="of hybrid, as 4GiB: what the process may use; not set: what is free of vram_fraction of the device",
    )
    offload_folder: Path | None = Field(
        default=None,
        description="of hybrid: directory for the blocks that are streamed, which are read anew in each pass; "
        "not set: they wait in host memory",
    )
    step_cache: bool = Field(
        default=False, description="of hybrid: leaves room for requests that ask for a step cache; others are refused"
    )

    @model_validator(mode="after")
    def _has_a_use_for_the_folder(self) -> Self:
        if self.offload_folder is not None and self.memory_mode != "hybrid":
            raise ValueError(f"offload_folder is of memory_mode hybrid, got {self.memory_mode}")
        return self


class GroupSettings(BaseSettings):
    """The processes that denoise together, under the names of LeaderWorkerSet or else of torchrun."""

    model_config = SettingsConfigDict(frozen=True)

    world_size: int = Field(default=1, ge=1, validation_alias=AliasChoices("LWS_GROUP_SIZE", "WORLD_SIZE"))
    rank: int = Field(default=0, ge=0, validation_alias=AliasChoices("LWS_WORKER_INDEX", "RANK"))
    leader: str = Field(default="", validation_alias=AliasChoices("LWS_LEADER_ADDRESS", "MASTER_ADDR"))
    port: int = Field(default=29500, ge=1, le=65535, validation_alias="MASTER_PORT")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.rank >= self.world_size:
            raise ValueError(f"the rank must be below the world size, {self.world_size}, got {self.rank}")
        if self.rank and not self.leader:
            raise ValueError("a worker needs the leader's address: LWS_LEADER_ADDRESS or MASTER_ADDR")
        return self

    def place(self) -> Place:
        return Place(self.rank, self.world_size, self.leader, self.port)


def main() -> None:
    settings, group = DenoiserSettings(), GroupSettings()
    make_service = partial(
        DenoiserService,
        precision=settings.precision,
        attention=settings.attention,
        memory_mode=settings.memory_mode,
        vram_bytes=settings.vram,
        offload_folder=settings.offload_folder,
        step_cache=settings.step_cache,
    )
    if group.world_size == 1:
        serve_stage("denoiser", make_service)
    elif group.rank == 0:
        leader = Leader(group.place())
        serve_stage("denoiser", partial(make_service, group=leader), serve=partial(serve_leader, leader))
    else:
        worker = Worker(group.place())
        serve_stage("denoiser", partial(make_service, group=worker), serve=partial(serve_worker, worker))


if __name__ == "__main__":
    main()
