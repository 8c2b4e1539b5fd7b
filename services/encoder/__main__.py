"""`python -m services.encoder`: the encoder stage as a process. Settings: runtime.settings.StageSettings."""

from runtime.settings import serve_stage
from services.encoder.service import EncoderService

if __name__ == "__main__":
    serve_stage("encoder", EncoderService, max_concurrent=4)
