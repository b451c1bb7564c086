from .embeddings import Embeddings as Embeddings
from .embeddings import open_embeddings as open_embeddings
from .embeddings import write_embeddings as write_embeddings
from .encoder import Encoder as Encoder
from .encoder import build_encoder as build_encoder
from .run import extract as extract
