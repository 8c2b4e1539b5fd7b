"""`python -m services.denoiser`: the denoiser stage as a process. Settings: runtime.settings.StageSettings."""

from runtime.settings import serve_stage
from services.denoiser.service import DenoiserService

if __name__ == "__main__":
    serve_stage("denoiser", DenoiserService)
