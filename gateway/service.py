"""GatewayService: assets in, generations, artifacts out. Thin: what it does is in the store, the assets and the worker."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from bunraku.errors import BunrakuError, InvalidRequest, NotFound
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc
from gateway.assets import AssetStore, asset_id
from gateway.callers.authentication import require_scope
from gateway.callers.identity import calling
from gateway.callers.ownership import AssetOwners
from gateway.fetch import Fetcher, is_url
from gateway.jobs.job import Job, generation_id
from gateway.jobs.store import JobStore
from gateway.media import InputLimits, read_image
from gateway.requests import ModelSpec, checked, named_assets, planned, request_digest
from gateway.stages import Stages
from runtime import telemetry
from runtime.replicas import Endpoint, stage_status
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
        fetcher: Fetcher | None = None,
        limits: InputLimits = InputLimits(),  # noqa: B008  # frozen
    ) -> None:
        self._store, self._assets, self._stages, self._models = store, assets, stages, models
        self._max_seconds, self._fetcher, self._limits = max_seconds, fetcher, limits
        self._owners = AssetOwners(store.database)
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
            asset = await upload.finish()
        await self._owners.add(asset.sha256)
        return pb.UploadAssetResponse(asset=asset)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        return pb.GetUploadResponse(received_bytes=await self._assets.received_bytes(request.upload_id))

    async def GetAsset(self, request: pb.GetAssetRequest, context: Context) -> pb.GetAssetResponse:
        return pb.GetAssetResponse(asset=await self._asset(request.name))

    async def DownloadAsset(
        self, request: pb.DownloadAssetRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAssetResponse]:
        asset = await self._asset(request.name)
        yield pb.DownloadAssetResponse(asset=asset)
        async for data in self._assets.read(asset.sha256, request.offset_bytes):
            yield pb.DownloadAssetResponse(data=data)

    # Generations

    async def CreateGeneration(
        self, request: pb.CreateGenerationRequest, context: Context
    ) -> pb.CreateGenerationResponse:
        digest, caller = request_digest(request), calling()
        earlier = await self._store.admit(request.request_id, digest, caller)
        if earlier is not None:
            return pb.CreateGenerationResponse(generation=earlier.to_proto())
        complete = checked(request, self._models, max_timeout_seconds=self._max_seconds)
        complete = await self._with_what_files_tell(await self._fetched(complete))
        job = await self._store.create(
            complete,
            request_digest=digest,
            trace_parent=telemetry.trace_parent(),
            caller=caller,
            timeout_s=min(complete.timeout_seconds or self._max_seconds, self._max_seconds),
        )
        return pb.CreateGenerationResponse(generation=job.to_proto())

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        job = await self._store.get(generation_id(request.name), calling().owner)
        return pb.GetGenerationResponse(generation=await self._with_place(job))

    async def ListGenerations(self, request: pb.ListGenerationsRequest, context: Context) -> pb.ListGenerationsResponse:
        jobs, token = await self._store.list_jobs(
            request.page_size, request.page_token, request.states, calling().owner
        )
        return pb.ListGenerationsResponse(generations=[job.to_proto() for job in jobs], next_page_token=token)

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        watching = self._store.watch(generation_id(request.name), request.after_sequence, calling().owner)
        async with aclosing(watching) as events:
            async for event in events:
                yield event

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        job = await self._store.request_cancel(generation_id(request.name), calling().owner)
        return pb.CancelGenerationResponse(generation=job.to_proto())

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, context: Context
    ) -> pb.DeleteGenerationResponse:
        video = await self._store.delete(generation_id(request.name), calling().owner)
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

    async def _with_place(self, job: Job) -> pb.Generation:
        """A generation with where it stands in the queue, if it waits."""
        generation, place = job.to_proto(), await self._store.place(job)
        if place is not None:
            generation.progress.queue_position = place.position
            if place.remaining_s is not None:
                generation.progress.remaining.FromMilliseconds(round(place.remaining_s * 1000))
        return generation

    async def _asset(self, name: str) -> pb.Asset:
        """What is known of a file. Raises NotFound where there is none, or none that the caller sees."""
        await self._owners.require(asset_id(name))
        return await self._assets.get(asset_id(name))

    async def _fetched(self, request: pb.CreateGenerationRequest) -> pb.CreateGenerationRequest:
        """The request with assets in place of URLs: what they name is fetched and belongs to the caller from now on."""
        urls = {field: name for field, name in named_assets(request).items() if is_url(name)}
        if not urls:
            return request
        require_scope(calling(), "UploadAsset")
        if self._fetcher is None:
            raise InvalidRequest(*((field, "must name an asset: this gateway fetches nothing") for field in urls))
        fetched = pb.CreateGenerationRequest()
        fetched.CopyFrom(request)
        async with asyncio.TaskGroup() as group:
            tasks = {field: group.create_task(self._fetch(self._fetcher, url, field)) for field, url in urls.items()}
        for field, task in tasks.items():
            setattr(fetched.animate, field.removeprefix("animate."), task.result().name)
        return fetched

    async def _fetch(self, fetcher: Fetcher, url: str, field: str) -> pb.Asset:
        with tempfile.TemporaryDirectory(prefix="bunraku-") as directory:
            path = Path(directory) / "file"
            asset = await self._assets.put_file(path, await fetcher.fetch(url, path, field))
        await self._owners.add(asset.sha256)
        return asset

    async def _with_what_files_tell(self, request: pb.CreateGenerationRequest) -> pb.CreateGenerationRequest:
        """The request with size, number of frames and frame rate; files that cannot be read are refused here."""
        paths = await self._asset_paths(request)
        field = "animate.reference_image"
        height, width, _ = (await asyncio.to_thread(read_image, paths.pop(field), field, self._limits.images)).shape
        videos = {
            field: await asyncio.to_thread(probe_video, path, field, self._limits.videos)
            for field, path in paths.items()
        }
        source = videos[f"animate.{request.animate.WhichOneof('motion')}"]
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
        paths = {}
        named = {field: asset_id(name, field) for field, name in named_assets(request).items()}
        seen = await self._owners.seen(named.values())
        for field, name in named.items():
            with suppress(NotFound):
                if name in seen:
                    paths[field] = await self._assets.path(name)
        missing = [(field, f"there is no assets/{name}") for field, name in named.items() if field not in paths]
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
