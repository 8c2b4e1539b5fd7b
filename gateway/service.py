"""GatewayService: assets in, generations, artifacts out. Thin: what it does is in the store, the assets and the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from bunraku.errors import BunrakuError, InvalidRequest, NotFound
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore, asset_id
from gateway.media import read_image
from gateway.requests import ModelSpec, checked, named_assets, planned, request_digest
from gateway.stages import Stages
from gateway.store import JobStore, generation_id
from runtime import telemetry
from runtime.client import Endpoint, stage_status
from runtime.stage import program_version
from runtime.video import probe_video

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """What clients call."""

    full_name = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name

    def __init__(
        self,
        store: JobStore,
        assets: AssetStore,
        stages: Stages,
        models: Sequence[ModelSpec],
        max_seconds: int,
    ) -> None:
        self._store, self._assets, self._stages, self._models = store, assets, stages, models
        self._max_seconds = max_seconds
        self._start = datetime.now(UTC)

    # Assets

    async def UploadAsset(
        self, requests: AsyncIterator[pb.UploadAssetRequest], context: Context
    ) -> pb.UploadAssetResponse:
        first = await anext(requests, pb.UploadAssetRequest())
        if first.WhichOneof("message") != "metadata":
            raise InvalidRequest(("metadata", "must be the first message"))
        async with await self._assets.begin(first.metadata) as upload:
            async for request in requests:
                if request.WhichOneof("message") != "data":
                    raise InvalidRequest(("metadata", "came twice"))
                await upload.append(request.data)
            return pb.UploadAssetResponse(asset=await upload.finish())

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        return pb.GetUploadResponse(received_bytes=await self._assets.received_bytes(request.upload_id))

    async def GetAsset(self, request: pb.GetAssetRequest, context: Context) -> pb.GetAssetResponse:
        return pb.GetAssetResponse(asset=await self._assets.get(asset_id(request.name)))

    async def DownloadAsset(
        self, request: pb.DownloadAssetRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAssetResponse]:
        asset = await self._assets.get(asset_id(request.name))
        yield pb.DownloadAssetResponse(asset=asset)
        async for data in self._assets.read(asset.sha256, request.offset_bytes):
            yield pb.DownloadAssetResponse(data=data)

    # Generations

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        digest = request_digest(request)
        earlier = await self._store.find(request.request_id, digest)
        if earlier is not None:
            return pb.CreateGenerationResponse(generation=earlier.to_proto())
        complete = checked(request, self._models, max_timeout_seconds=self._max_seconds)
        complete = await self._with_what_files_tell(complete)
        job = await self._store.create(complete, request_digest=digest, trace_parent=telemetry.trace_parent())
        return pb.CreateGenerationResponse(generation=job.to_proto())

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        job = await self._store.get(generation_id(request.name))
        return pb.GetGenerationResponse(generation=job.to_proto())

    async def ListGenerations(self, request: pb.ListGenerationsRequest, context: Context) -> pb.ListGenerationsResponse:
        jobs, token = await self._store.list_jobs(request.page_size, request.page_token, request.states)
        return pb.ListGenerationsResponse(generations=[job.to_proto() for job in jobs], next_page_token=token)

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        async with aclosing(self._store.watch(generation_id(request.name), request.after_sequence)) as events:
            async for event in events:
                yield event

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        job = await self._store.request_cancel(generation_id(request.name))
        return pb.CancelGenerationResponse(generation=job.to_proto())

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, context: Context
    ) -> pb.DeleteGenerationResponse:
        video = await self._store.delete(generation_id(request.name))
        if video is not None:
            await self._assets.delete(video)
        return pb.DeleteGenerationResponse()

    # The system

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[model.to_proto() for model in self._models])

    async def GetSystemStatus(self, request: pb.GetSystemStatusRequest, context: Context) -> pb.GetSystemStatusResponse:
        asked = [
            _endpoint_status(stage, endpoint)
            for stage, client in self._stages.clients.items()
            for endpoint in await client.endpoints()
        ]
        counts = await self._store.counts()
        response = pb.GetSystemStatusResponse(
            stages=await asyncio.gather(*asked),
            queued_generations=counts[pb.GENERATION_STATE_QUEUED],
            running_generations=counts[pb.GENERATION_STATE_RUNNING],
            version=program_version(),
        )
        response.start_time.FromDatetime(self._start)
        return response

    async def _with_what_files_tell(self, request: pb.CreateGenerationRequest) -> pb.CreateGenerationRequest:
        """The request with size, number of frames and frame rate; files that cannot be read are refused here."""
        paths = await self._asset_paths(request)
        field = "animate.reference_image"
        height, width, _ = (await asyncio.to_thread(read_image, paths[field], field)).shape
        field = f"animate.{request.animate.WhichOneof('motion')}"
        source = await asyncio.to_thread(probe_video, paths[field], field)
        model = next(model for model in self._models if model.name == request.model)
        return planned(
            request,
            model,
            reference_height=height,
            reference_width=width,
            source_frames=source.num_frames,
            source_frames_per_second=source.frames_per_second,
        )

    async def _asset_paths(self, request: pb.CreateGenerationRequest) -> dict[str, Path]:
        """Where the files are that a request names, by field. Raises InvalidRequest naming all that are not there."""
        paths, missing = {}, []
        for field, name in named_assets(request).items():
            try:
                paths[field] = await self._assets.path(asset_id(name, field))
            except NotFound:
                missing.append((field, f"there is no asset {name}"))
        if missing:
            raise InvalidRequest(*missing)
        return paths


async def _endpoint_status(stage: str, endpoint: Endpoint) -> pb.StageEndpoint:
    answer = pb.StageEndpoint(stage=stage, address=endpoint.address, shared_memory=bool(endpoint.agreed))
    try:
        answer.status.CopyFrom(await stage_status(endpoint))
        answer.reachable = True
    except BunrakuError as error:
        answer.problem = error.message
    return answer
