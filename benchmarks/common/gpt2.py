"""examples/gpt2, for what measures its network and keeps checkpoints as it does."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples" / "gpt2"))
import checkpoint as checkpoint
from config import parse_args as parse_args
from data import Tokens as Tokens, load_data as load_data
from model import (
    AXES as AXES,
    GPT as GPT,
    create_losses as create_losses,
    create_mesh as create_mesh,
    create_network as create_network,
    parameter_shardings as parameter_shardings,
)
from step import (
    compiler_options as compiler_options,
    create_optimizer as create_optimizer,
    create_train_step as create_train_step,
)
from train import (
    ROWS as ROWS,
    evaluate as evaluate,
    fit as fit,
    open_checkpoints as open_checkpoints,
    posterior_perplexities as posterior_perplexities,
    run as run,
)
