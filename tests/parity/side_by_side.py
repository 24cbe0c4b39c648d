"""Our decoder and transformers', and what each makes of the same tokens."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import CONFIG, MOE

from opd_jax.model.hf_export import _hf_arrays
from opd_jax.model.hf_tensors import expected_shapes

BASE = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
LENGTH = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, LENGTH: 16}
MIXTURE = {key: value for key, value in MOE.items() if key not in ("architectures", "model_type")}
MIXTURE["moe_intermediate_size"] = 16  # torch's grouped product wants rows of 16 bytes


def random_hf_model(folder, family, changes):
    """Weights far from initialisation, so that every part of the decoder shows in the logits.

    `changes` are laid over the tiny default; with `head_dim=None`, config.json has no such key.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in (BASE | changes).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 or "bias" in name else 0.2
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if "head_dim" not in keys:
        written = json.loads((folder / "config.json").read_text())
        written.pop("head_dim", None)  # transformers writes the one it derived
        (folder / "config.json").write_text(json.dumps(written))
    return model


def hf_model_of_gguf(path, **config_changes):
    """As `from_pretrained(gguf_file=...)`, which in transformers 5.23 needs accelerate too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    content = load_gguf_checkpoint(str(path))["config"]
    config = AutoConfig.for_model(**(content | config_changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


def _forward(model, params, tokens_bt, positions_bt, segments_bt):
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1])[None], tokens_bt.shape)
    hidden = model.forward(params, tokens_bt, positions_bt, segments_bt).hidden_btd
    return jnp.einsum("btd,vd->btv", hidden, model.head(params), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _loss_gradient(model, params, tokens_bt, weight_btv, positions_bt, segments_bt):
    def loss(params):
        logits_btv = _forward(model, params, tokens_bt, positions_bt, segments_bt)
        return jnp.sum(weight_btv * jax.nn.log_softmax(logits_btv))

    return jax.grad(loss)(params)


_logits = functools.partial(jax.jit, static_argnums=0)(_forward)


def our_logits(model, params, tokens_bt, positions_bt=None, segments_bt=None):
    return np.asarray(_logits(model, params, jnp.asarray(tokens_bt), positions_bt, segments_bt))


def their_logits(model, tokens_bt):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_bt)).logits.float().numpy()


def our_gradients(model, params, tokens_bt, weight_btv, positions_bt=None, segments_bt=None):
    """Of sum(weight * log-softmax(logits)), by name in the checkpoint."""
    tokens_bt = jnp.asarray(tokens_bt)
    gradient = _loss_gradient(model, params, tokens_bt, weight_btv, positions_bt, segments_bt)
    return dict(zip(expected_shapes(model), _hf_arrays(model, gradient), strict=True))


def their_gradients(model, batches):
    """The same, summed over the batches (tokens_bt, weight_btv): experts one by one."""
    import torch

    model.zero_grad()
    for tokens_bt, weight_btv in batches:
        logprob = torch.log_softmax(model(torch.tensor(tokens_bt)).logits, -1)
        (logprob * torch.tensor(weight_btv)).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        if "mlp.experts." not in name:
            found[name] = gradient
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(gradient):
            parts = np.split(matrix, 2) if kind == "gate_up_proj" else [matrix]
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, piece in zip(names, parts, strict=True):
                found[f"{prefix}.{expert}.{part}.weight"] = piece
    return found


def worst_gradient(ours, expected):
    """The largest difference, as a share of its tensor's largest gradient."""
    assert ours.keys() == expected.keys()
    return max(
        np.abs(ours[name] - want).max() / max(np.abs(want).max(), 1e-6)
        for name, want in expected.items()
    )
