"""`python -m services.pose`: the pose stage as a process. Settings: runtime.settings.StageSettings."""

from runtime.settings import serve_stage
from services.pose.service import PoseService

if __name__ == "__main__":
    serve_stage("pose", PoseService, max_concurrent=2, uses_torch=False)
