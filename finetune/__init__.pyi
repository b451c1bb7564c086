from .checkpoints import LoadedRun as LoadedRun
from .checkpoints import load_run as load_run
from .predict import Predicted as Predicted
from .predict import predict_to as predict_to
from .results import RunResult as RunResult
from .run import finetune as finetune
from .settings import FinetuneSettings as FinetuneSettings
