"""`python -m services.pose`: the pose stage as a process. Settings: runtime.settings.StageSettings."""

from runtime.bundles import BundleError, load_bundle
from runtime.settings import StageSettings, serve_stage
from services.pose.service import COMPONENTS, PoseService


def finds_people() -> bool:
    """Whether the bundle has models for it: only then torch, which takes seconds to import, is asked for a device."""
    settings = StageSettings()  # type: ignore[call-arg]  # its fields come from the environment
    try:
        return bool(COMPONENTS & load_bundle(settings.bundle, settings.models).components.keys())
    except BundleError:
        return False  # serve_stage says what is wrong with it


if __name__ == "__main__":
    serve_stage("pose", PoseService, max_concurrent=2, uses_torch=finds_people())
