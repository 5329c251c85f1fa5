"""The language model of lds.py: a GPT-2 of bytes whose layers all peers know.

    curate train CORPUS --model benchmarks/lds_model.py:gpt2

No dropout, an untied head, and nn.Linear in the place of transformers' Conv1D.
"""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

TOKENS, LAYERS, WIDTH = 96, 2, 64
BLOCK_LAYERS = [
    f"transformer.h.{i}.{kind}"
    for i in range(LAYERS)
    for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def gpt2(**_: object) -> nn.Module:
    """Return the model with random weights; the vocabulary is all bytes, whatever the rows have."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=TOKENS,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
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
