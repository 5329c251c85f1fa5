"""The model and the rows that everybody scores: made once, read from a folder by every driver.

A GPT-2 of transformers with an untied head and without dropout, its Conv1D layers turned into
nn.Linear, which all peers know. The loss of a row is the sum over its next tokens. Needs torch and
transformers alone: drivers run in an environment that has no curate.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """Sizes of the model and of the batch, and where and how they are run."""

    layers: int = 4
    width: int = 256
    tokens: int = 128
    vocab: int = 8192
    rows: int = 16
    k: int = 32
    wide_k: int = 2048
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def write(self, folder: Path) -> None:
        """Draw the weights and the rows, and write them with the sizes."""
        torch.manual_seed(0)
        torch.save(_model(self).state_dict(), folder / "weights.pt")
        torch.save(torch.randint(self.vocab, (self.rows, self.tokens)), folder / "ids.pt")
        (folder / "subject.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Subject":
        return cls(**json.loads((folder / "subject.json").read_text()))

    def model(self, folder: Path) -> nn.Module:
        """Return the model in evaluation mode on its device."""
        model = _model(self)
        model.load_state_dict(torch.load(folder / "weights.pt"))
        return model.to(self.device, DTYPES[self.dtype]).eval()

    def ids(self, folder: Path) -> Tensor:
        """Return the rows, [rows, tokens]."""
        ids: Tensor = torch.load(folder / "ids.pt")
        return ids.to(self.device)

    @property
    def block_layers(self) -> list[str]:
        """The linear layers within the blocks; the head is not among them."""
        kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        return [f"transformer.h.{i}.{kind}" for i in range(self.layers) for kind in kinds]


@dataclass(frozen=True)
class Curvature:
    """A layer's Kronecker eigenbases and what its gradient's squares are multiplied with there."""

    outputs: Tensor
    """[O, O], an eigenvector a column."""
    inputs: Tensor
    """[I + 1, I + 1]; the bias is the last input."""
    weight: Tensor
    """[O, I + 1]: 1 / (eigenvalue + damping)."""


def curvatures(folder: Path, layers: list[str]) -> dict[str, Curvature]:
    """Return the EK-FAC factors that kronfluence's driver left in the folder, in float64."""
    kept = torch.load(folder / "ekfac.pt")
    found, factors = {}, kept["factors"]
    for layer in layers:
        squares = factors["lambda_matrix"][layer].double()
        squares /= factors["num_lambda_processed"][layer]
        found[layer] = Curvature(
            factors["gradient_eigenvectors"][layer].double(),
            factors["activation_eigenvectors"][layer].double(),
            1 / (squares + kept["damping"]),
        )
    return found


def row_losses(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return each row's loss, [rows]."""
    logits = model(input_ids=ids, **inputs).logits[:, :-1]
    tokens = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return tokens.view(len(ids), -1).sum(1)


def _model(subject: Subject) -> nn.Module:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=subject.vocab,
            n_positions=subject.tokens,
            n_embd=subject.width,
            n_layer=subject.layers,
            n_head=max(1, subject.width // 64),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",  # vmap goes through no fused attention
        )
    )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})
                setattr(parent, name, linear)
    return model
