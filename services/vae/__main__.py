"""`python -m services.vae`: the VAE stage as a process. Settings: runtime.settings.StageSettings."""

from runtime.settings import serve_stage
from services.vae.service import VaeService

if __name__ == "__main__":
    serve_stage("vae", VaeService, max_concurrent=2)
