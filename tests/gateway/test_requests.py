"""Requests: every bound at its edges, the defaults, and the sizes and lengths that follow from the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from bunraku.errors import InvalidRequest, NotThereYet
from bunraku.v1 import gateway_pb2 as pb
from gateway.requests import (
    ModelSpec,
    checked,
    default_seed,
    named_assets,
    plan_frames,
    plan_size,
    planned,
    request_digest,
)
from runtime.bundles import load_bundle

SCAIL = ModelSpec(
    name="scail-14b",
    task="animate",
    family="scail",
    revision="0123456789ab",
    num_inference_steps=30,
    guidance_scale=5.0,
    shift=7.0,
    solver="unipc",
    default_height=480,
    default_width=832,
    window_frames=81,
    window_overlap_frames=5,
    max_pixels=1280 * 704,
    max_frames=737,
    frames_per_second=16,
    color_correction_strength=0.75,
    preset="official",
    presets=("official", "wan2gp"),
    negative_prompt="blurry",
)
TINY = replace(SCAIL, name="tiny", window_frames=33, presets=("official",))
T2V = replace(SCAIL, name="t2v", task="text_to_video")
MODELS = (T2V, SCAIL, TINY)

IMAGE, POSE = f"assets/{'a' * 64}", f"assets/{'b' * 64}"
Change = Callable[[pb.CreateGenerationRequest], object]


def request(changes: str = "") -> pb.CreateGenerationRequest:
    """A good request, with fields in protobuf's text form merged in."""
    good = f'animate {{ prompt: "a dancer" reference_image: "{IMAGE}" pose_video: "{POSE}" }} '
    return text_format.Merge(changes, text_format.Parse(good, pb.CreateGenerationRequest()))


def wrong_fields(message: pb.CreateGenerationRequest, models: tuple[ModelSpec, ...] = MODELS) -> list[str]:
    with pytest.raises(InvalidRequest) as refused:
        checked(message, models)
    return [field for field, _ in refused.value.violations]


# Defaults


def test_what_is_not_set_takes_the_models_defaults() -> None:
    result = checked(request(), MODELS)
    assert result.model == "scail-14b"  # the first for the task
    assert result.timeout_seconds == 24 * 3600
    animate, sampling, output = result.animate, result.sampling, result.output
    assert (animate.prompt, animate.negative_prompt) == ("a dancer", "blurry")
    assert (animate.people, animate.window_overlap_frames) == (1, 5)
    assert (animate.color_correction_strength, animate.preset) == (0.75, "official")
    assert (sampling.num_inference_steps, sampling.solver) == (30, "unipc")
    assert (sampling.guidance_scale, sampling.shift) == (5.0, 7.0)
    assert sampling.HasField("seed")
    assert not sampling.HasField("guidance_scale_low_noise")
    assert (output.size_mode, output.crf) == (pb.SIZE_MODE_BUDGET, 8)
    assert (output.height, output.width, output.num_frames) == (0, 0, 0)  # known once the files are


def test_what_is_set_stays_even_where_it_is_zero() -> None:
    wanted = request("""
        model: "tiny" timeout_seconds: 60 priority: 9 request_id: "r-1"
        animate { negative_prompt: "bad" people: 2 window_overlap_frames: 9 color_correction_strength: 0
                  preset: "official" }
        sampling { seed: 0 num_inference_steps: 1 guidance_scale: 0 shift: 0.1 solver: "dpm++" step_cache: "mag"
                   step_cache_speedup: 2.5 guidance_end: 0.5 cfg_zero_star: true }
        output { height: 64 width: 96 size_mode: SIZE_MODE_CROP num_frames: 9 frames_per_second: 60 crf: 0 }
    """)
    assert checked(wanted, MODELS) == wanted


def test_checking_twice_changes_nothing_and_the_callers_request_is_left_alone() -> None:
    original = request()
    once = checked(original, MODELS)
    assert checked(once, MODELS) == once
    assert original == request()


def test_the_low_noise_expert_has_its_default_where_there_is_one() -> None:
    two_experts = replace(SCAIL, guidance_scale_low_noise=3.0)
    assert checked(request(), [two_experts]).sampling.guidance_scale_low_noise == 3.0
    assert checked(request("sampling { guidance_scale_low_noise: 0 }"), [two_experts]) is not None


def test_a_step_cache_has_a_default_speedup_and_nothing_has_without_one() -> None:
    assert checked(request('sampling { step_cache: "tea" }'), MODELS).sampling.step_cache_speedup == 1.75
    plain = checked(request(), MODELS).sampling
    assert not any(plain.HasField(name) for name in ("step_cache_speedup", "guidance_end"))
    assert (plain.step_cache, plain.guidance_start, plain.cfg_zero_star, plain.zero_init_steps) == ("", 0, False, 0)


def test_an_empty_prompt_is_fine() -> None:
    message = request()
    message.animate.prompt = ""
    assert checked(message, MODELS).animate.prompt == ""


def test_random_seeds_differ_and_survive_json() -> None:
    seeds = {default_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**24


# Bounds: what is just inside and just outside

BOUNDS = [
    ("request_id", 'request_id: "aZ09-_"', 'request_id: "a b"'),
    ("request_id", f'request_id: "{"x" * 64}"', f'request_id: "{"x" * 65}"'),
    ("request_id", "", 'request_id: "a\\n"'),
    ("model", 'model: "tiny"', 'model: "t2v"'),
    ("model", "", 'model: "unknown"'),
    ("timeout_seconds", "timeout_seconds: 86400", "timeout_seconds: 86401"),
    ("priority", "priority: 9", "priority: 10"),
    ("animate.people", "animate { people: 5 }", "animate { people: 6 }"),
    ("animate.window_overlap_frames", "animate { window_overlap_frames: 77 }", "animate { window_overlap_frames: 81 }"),
    ("animate.window_overlap_frames", "animate { window_overlap_frames: 1 }", "animate { window_overlap_frames: 4 }"),
    (
        "animate.color_correction_strength",
        "animate { color_correction_strength: 1 }",
        "animate { color_correction_strength: 1.01 }",
    ),
    ("animate.color_correction_strength", "", "animate { color_correction_strength: -0.01 }"),
    ("animate.color_correction_strength", "", "animate { color_correction_strength: nan }"),
    ("animate.preset", 'animate { preset: "wan2gp" }', 'animate { preset: "other" }'),
    ("animate.preset", "", 'model: "tiny" animate { preset: "wan2gp" }'),
    ("animate.mask_video", "", f'animate {{ mask_video: "{POSE}" }}'),
    ("animate.reference_image", "", 'animate { reference_image: "assets/../x" }'),
    ("animate.pose_video", "", 'animate { pose_video: "file:///a.mp4" }'),
    ("animate.pose_video", "", 'animate { pose_video: "" }'),
    ("sampling.seed", f"sampling {{ seed: {2**63 - 1} }}", f"sampling {{ seed: {2**63} }}"),
    ("sampling.num_inference_steps", "sampling { num_inference_steps: 1 }", "sampling { num_inference_steps: 0 }"),
    ("sampling.num_inference_steps", "sampling { num_inference_steps: 100 }", "sampling { num_inference_steps: 101 }"),
    ("sampling.guidance_scale", "sampling { guidance_scale: 0 }", "sampling { guidance_scale: -0.1 }"),
    ("sampling.guidance_scale", "sampling { guidance_scale: 30 }", "sampling { guidance_scale: 30.1 }"),
    ("sampling.guidance_scale", "", "sampling { guidance_scale: nan }"),
    ("sampling.guidance_scale", "", "sampling { guidance_scale: inf }"),
    ("sampling.guidance_scale_low_noise", "", "sampling { guidance_scale_low_noise: 1 }"),  # one expert only
    ("sampling.guidance_scale_low_noise", "", "sampling { guidance_scale_low_noise: nan }"),
    ("sampling.shift", "sampling { shift: 0.1 }", "sampling { shift: 0.09 }"),
    ("sampling.shift", "sampling { shift: 100 }", "sampling { shift: 100.1 }"),
    ("sampling.shift", "", "sampling { shift: 0 }"),
    ("sampling.shift", "", "sampling { shift: nan }"),
    ("sampling.shift", "", "sampling { shift: -inf }"),
    ("sampling.solver", 'sampling { solver: "euler" }', 'sampling { solver: "Euler" }'),
    ("sampling.step_cache", 'sampling { step_cache: "tea" }', 'sampling { step_cache: "magic" }'),
    (
        "sampling.step_cache_speedup",
        'sampling { step_cache: "mag" step_cache_speedup: 3 }',
        "sampling { step_cache_speedup: 2 }",
    ),
    (
        "sampling.step_cache_speedup",
        'sampling { step_cache: "mag" step_cache_speedup: 1 }',
        'sampling { step_cache: "mag" step_cache_speedup: 0.99 }',
    ),
    ("sampling.step_cache_speedup", "", 'sampling { step_cache: "mag" step_cache_speedup: 3.01 }'),
    ("sampling.step_cache_speedup", "", 'sampling { step_cache: "mag" step_cache_speedup: nan }'),
    (
        "sampling.step_cache_start",
        'sampling { step_cache: "mag" step_cache_start: 1 }',
        "sampling { step_cache_start: 0.5 }",
    ),
    ("sampling.step_cache_start", "", 'sampling { step_cache: "mag" step_cache_start: 1.01 }'),
    ("sampling.step_cache_start", "", 'sampling { step_cache: "mag" step_cache_start: nan }'),
    ("sampling.guidance_start", "sampling { guidance_start: 0.99 }", "sampling { guidance_start: 1 }"),
    ("sampling.guidance_start", "", "sampling { guidance_start: -0.01 }"),
    ("sampling.guidance_start", "", "sampling { guidance_start: nan }"),
    ("sampling.guidance_end", "sampling { guidance_end: 1 }", "sampling { guidance_end: 1.01 }"),
    (
        "sampling.guidance_end",
        "sampling { guidance_start: 0.4 guidance_end: 0.41 }",
        "sampling { guidance_start: 0.4 guidance_end: 0.4 }",
    ),
    ("sampling.guidance_end", "", "sampling { guidance_end: nan }"),
    ("sampling.zero_init_steps", "sampling { zero_init_steps: 29 }", "sampling { zero_init_steps: 30 }"),
    ("sampling.zero_init_steps", "", "sampling { num_inference_steps: 4 zero_init_steps: 4 }"),
    ("output.num_frames", "output { num_frames: 737 }", "output { num_frames: 738 }"),
    ("output.num_frames", "output { num_frames: 1 }", "output { num_frames: 1000000000 }"),
    ("output.frames_per_second", "output { frames_per_second: 1 }", "output { frames_per_second: 0.99 }"),
    ("output.frames_per_second", "output { frames_per_second: 60 }", "output { frames_per_second: 60.1 }"),
    ("output.frames_per_second", "output { frames_per_second: 0 }", "output { frames_per_second: -1 }"),
    ("output.frames_per_second", "", "output { frames_per_second: nan }"),
    ("output.crf", "output { crf: 51 }", "output { crf: 52 }"),
    ("output.width", "output { height: 64 width: 64 }", "output { height: 64 }"),
    ("output.height", "", "output { width: 64 }"),
    ("output.height", "output { height: 704 width: 1280 }", "output { height: 705 width: 1280 }"),
    ("output.height", "", "output { height: 704 width: 1312 size_mode: SIZE_MODE_CROP }"),
    ("output.height", "", "output { height: 4294967295 width: 4294967295 }"),
    ("output.height", "output { height: 1 width: 900000 }", "output { height: 1 width: 901121 }"),
    (
        "output.height",
        "output { height: 96 width: 64 size_mode: SIZE_MODE_CROP }",
        "output { height: 90 width: 64 size_mode: SIZE_MODE_CROP }",
    ),
    ("output.width", "output { height: 90 width: 70 }", "output { height: 64 width: 70 size_mode: SIZE_MODE_CROP }"),
    (
        "output.width",
        "output { height: 33 width: 32 size_mode: SIZE_MODE_FIT }",
        "output { height: 33 width: 31 size_mode: SIZE_MODE_FIT }",
    ),
    ("output.size_mode", "", "output { size_mode: SIZE_MODE_CROP }"),
    ("output.size_mode", "", "output { size_mode: SIZE_MODE_FIT }"),
    ("output.size_mode", "", "output { size_mode: 7 }"),
]


@pytest.mark.parametrize(("field", "good", "bad"), BOUNDS)
def test_a_value_outside_its_bounds_is_refused_by_name_and_one_inside_is_not(field: str, good: str, bad: str) -> None:
    checked(request(good), MODELS)
    assert wrong_fields(request(bad)) == [field]


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_prompts_have_a_length(field: str) -> None:
    checked(request(f'animate {{ {field}: "{"ü" * 10_000}" }}'), MODELS)
    assert wrong_fields(request(f'animate {{ {field}: "{"x" * 10_001}" }}')) == [f"animate.{field}"]


def test_missing_parts_are_named() -> None:
    assert wrong_fields(pb.CreateGenerationRequest()) == ["task"]
    empty = pb.CreateGenerationRequest(animate=pb.AnimateTask())
    assert wrong_fields(empty) == ["animate.reference_image", "animate.motion"]


def test_all_wrong_fields_are_named_at_once() -> None:
    bad = request("""
        request_id: "?" model: "none" priority: 10
        animate { people: 9 window_overlap_frames: 2 }
        sampling { shift: nan solver: "x" }
        output { crf: 99 height: 64 }
    """)
    assert wrong_fields(bad) == [
        "request_id",
        "model",
        "priority",
        "animate.people",
        "animate.window_overlap_frames",
        "sampling.shift",
        "sampling.solver",
        "output.width",
        "output.crf",
    ]


def test_an_unknown_model_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="there are: scail-14b, tiny"):
        checked(request('model: "x"'), MODELS)
    with pytest.raises(InvalidRequest, match="there are: none"):
        checked(request(), [T2V])


def test_the_gateways_timeout_is_a_limit_and_a_default() -> None:
    assert checked(request(), MODELS, max_timeout_seconds=100).timeout_seconds == 100
    with pytest.raises(InvalidRequest, match="0 to 100"):
        checked(request("timeout_seconds: 101"), MODELS, max_timeout_seconds=100)


@pytest.mark.parametrize("task", ["text_to_video", "image_to_video", "speech_to_video"])
def test_other_tasks_are_not_there_yet(task: str) -> None:
    with pytest.raises(NotThereYet, match=task):
        checked(request(f'{task} {{ prompt: "x" }}'), MODELS)


def test_a_driving_video_needs_a_model_that_finds_poses() -> None:
    driven = request(f'animate {{ driving_video: "{POSE}" }}')
    with pytest.raises(NotThereYet, match="pose_video"):
        checked(driven, MODELS)
    able = replace(SCAIL, extracts_poses=True)
    assert checked(driven, (able,)).animate.driving_video == POSE


# What else a request tells


def test_named_assets_are_found_with_their_fields() -> None:
    assert named_assets(request()) == {"animate.reference_image": IMAGE, "animate.pose_video": POSE}
    driven = request(f'animate {{ driving_video: "{POSE}" mask_video: "{IMAGE}" }}')
    assert named_assets(driven) == {
        "animate.reference_image": IMAGE,
        "animate.driving_video": POSE,
        "animate.mask_video": IMAGE,
    }


def test_digests_tell_requests_apart() -> None:
    assert request_digest(request()) == request_digest(request())
    assert len(request_digest(request())) == 64
    others = [request("priority: 1"), request("sampling { seed: 0 }"), request('animate { prompt: "x" }')]
    assert len({request_digest(other) for other in [request(), *others]}) == 4


def test_a_model_shows_its_defaults_and_limits() -> None:
    model = SCAIL.to_proto()
    assert (model.name, model.task, model.family, model.revision) == ("scail-14b", "animate", "scail", "0123456789ab")
    assert (model.default_height, model.default_width, model.size_multiple) == (480, 832, 32)
    assert (model.window_frames, model.window_overlap_frames) == (81, 5)
    assert (model.max_pixels, model.max_frames) == (1280 * 704, 737)
    sampling = pb.SamplingParameters(num_inference_steps=30, guidance_scale=5, shift=7, solver="unipc")
    assert model.default_sampling == sampling


def test_a_model_is_what_its_bundle_says(tmp_path: Path) -> None:
    (tmp_path / "bundle.toml").write_text("""
        name = "small"
        task = "animate"
        family = "scail"
        description = "d"
        preset = "wan2gp"
        [components]
        [sampling]
        num_inference_steps = 6
        guidance_scale = 2.0
        shift = 5.0
        solver = "euler"
        negative_prompt = "n"
        [video]
        height = 128
        width = 160
        window_frames = 33
        window_overlap_frames = 9
        max_pixels = 65536
        max_frames = 101
        size_multiple = 16
        frames_per_second = 12
        color_correction_strength = 0.5
        [presets.official]
        [presets.wan2gp]
    """)
    bundle = load_bundle(tmp_path)
    assert ModelSpec.from_bundle(bundle) == ModelSpec(
        name="small",
        task="animate",
        family="scail",
        revision=bundle.revision,
        num_inference_steps=6,
        guidance_scale=2.0,
        shift=5.0,
        solver="euler",
        default_height=128,
        default_width=160,
        window_frames=33,
        window_overlap_frames=9,
        max_pixels=65536,
        max_frames=101,
        frames_per_second=12,
        color_correction_strength=0.5,
        preset="wan2gp",
        presets=("official", "wan2gp"),
        negative_prompt="n",
        size_multiple=16,
    )


# Sizes


def size(
    reference: tuple[int, int], asked: tuple[int, int] = (0, 0), mode: pb.SizeMode.ValueType = pb.SIZE_MODE_BUDGET
) -> tuple[int, int]:
    output = pb.OutputParameters(height=asked[0], width=asked[1], size_mode=mode)
    return plan_size(*reference, output, SCAIL)


def test_a_budget_gives_the_pixels_asked_for_in_the_shape_of_the_picture() -> None:
    assert size((1024, 768)) == (736, 544)  # sqrt(480 * 832 / (1024 * 768)) = 0.7126 -> 729.7, 547.3
    assert size((768, 1024)) == (544, 736)
    assert size((1024, 768), (256, 256)) == (288, 224)  # 295.6, 221.7
    assert size((480, 832)) == (480, 832)


def test_sizes_are_rounded_as_python_does_halves_to_even() -> None:
    assert size((80, 80), (80, 80)) == (64, 64)  # 2.5 -> 2
    assert size((112, 112), (112, 112)) == (128, 128)  # 3.5 -> 4


def test_fit_lies_within_the_box_or_within_the_box_turned_on_its_side() -> None:
    assert size((768, 1024), (480, 832), pb.SIZE_MODE_FIT) == (480, 640)
    assert size((1024, 768), (480, 832), pb.SIZE_MODE_FIT) == (640, 480)
    assert size((100, 100), (500, 500), pb.SIZE_MODE_FIT) == (480, 480)


def test_crop_is_what_was_asked_for() -> None:
    assert size((1024, 768), (96, 640), pb.SIZE_MODE_CROP) == (96, 640)


def test_long_thin_pictures_keep_a_side_and_stay_within_the_limit() -> None:
    assert size((10_000, 1)) == (28_160, 32)  # 1280 * 704 / 32
    assert size((1, 10_000)) == (32, 28_160)


def test_rounding_up_never_passes_the_models_limit() -> None:
    model = replace(SCAIL, max_pixels=112 * 112)
    output = pb.OutputParameters(height=112, width=112, size_mode=pb.SIZE_MODE_BUDGET)
    height, width = plan_size(112, 112, output, model)  # 128 x 128 would be too much
    assert height * width <= 112 * 112
    assert {height, width} == {128, 96}


sides = st.integers(1, 20_000)


@settings(deadline=None)
@given(sides, sides, st.integers(1, 1280 * 704), st.integers(1, 1280 * 704))
def test_every_budget_gives_a_size_that_the_model_can_do(h: int, w: int, height: int, area: int) -> None:
    output_height, output_width = size((h, w), (height, max(1, area // height)))
    assert output_height % 32 == output_width % 32 == 0
    assert min(output_height, output_width) >= 32
    assert output_height * output_width <= SCAIL.max_pixels


@settings(deadline=None)
@given(st.integers(200, 4000), st.integers(200, 4000), st.integers(256, 704), st.integers(256, 1280))
def test_a_budget_misses_neither_pixels_nor_shape_by_more_than_the_rounding(
    h: int, w: int, height: int, width: int
) -> None:
    got = size((h, w), (height, width))
    exact = [side * math.sqrt(height * width / (h * w)) for side in (h, w)]
    if got[0] * got[1] + 32 * max(got) <= SCAIL.max_pixels:  # not cut down to the limit
        assert all(abs(side - ideal) <= 16.001 or side == 32 for side, ideal in zip(got, exact, strict=True))


@settings(deadline=None)
@given(sides, sides, st.integers(32, 1280), st.integers(32, 704))
def test_every_fit_lies_within_its_box(h: int, w: int, height: int, width: int) -> None:
    got = size((h, w), (height, width), pb.SIZE_MODE_FIT)
    assert got[0] % 32 == got[1] % 32 == 0
    assert min(got) >= 32
    assert (got[0] <= height and got[1] <= width) or (got[0] <= width and got[1] <= height)


# Lengths


@pytest.mark.parametrize(
    ("source", "requested", "expected"),
    [(81, 0, 81), (84, 0, 81), (85, 0, 85), (100, 80, 77), (100, 3, 1), (5, 0, 5), (8, 0, 5), (5000, 0, 737)],
)
def test_a_video_is_as_long_as_its_source_rounded_down_to_4k_plus_1(source: int, requested: int, expected: int) -> None:
    assert plan_frames(source, requested, SCAIL) == expected


@settings(deadline=None)
@given(st.integers(5, 10_000), st.integers(0, 737), st.integers(1, 737))
def test_every_length_is_4k_plus_1_and_the_most_that_is_allowed(source: int, requested: int, most: int) -> None:
    num_frames = plan_frames(source, requested, replace(SCAIL, max_frames=most))
    allowed = min(source, most, *([requested] if requested else []))
    assert num_frames % 4 == 1
    assert allowed - 4 < num_frames <= allowed


def test_a_source_that_is_too_short_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="at least 5 frames, has 4") as refused:
        plan_frames(4, 0, SCAIL, "animate.driving_video")
    assert refused.value.violations[0][0] == "animate.driving_video"


# The plan


def plan(message: pb.CreateGenerationRequest) -> pb.CreateGenerationRequest:
    return planned(
        message,
        SCAIL,
        reference_height=1024,
        reference_width=768,
        source_frames=100,
        source_frames_per_second=Fraction(30000, 1001),
    )


def test_a_plan_fills_in_size_length_and_frame_rate_and_leaves_the_rest() -> None:
    before = checked(request(), MODELS)
    after = plan(before)
    output = after.output
    assert (output.height, output.width, output.num_frames) == (736, 544, 97)
    assert output.frames_per_second == 30000 / 1001
    assert (before.output.height, before.output.num_frames) == (0, 0)
    after.output.CopyFrom(before.output)
    assert after == before


def test_a_plan_keeps_what_was_asked_for() -> None:
    asked = "output { height: 96 width: 64 size_mode: SIZE_MODE_CROP num_frames: 30 frames_per_second: 12 }"
    output = plan(checked(request(asked), MODELS)).output
    assert (output.height, output.width, output.num_frames, output.frames_per_second) == (96, 64, 29, 12)


def test_a_plan_names_the_video_that_is_too_short() -> None:
    with pytest.raises(InvalidRequest) as refused:
        planned(
            request(),
            SCAIL,
            reference_height=8,
            reference_width=8,
            source_frames=4,
            source_frames_per_second=Fraction(16),
        )
    assert refused.value.violations[0][0] == "animate.pose_video"
