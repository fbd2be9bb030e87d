"""Load an encoder that nnssl exported, with PyTorch, safetensors and dynamic-network-architectures.

nnssl must be installed only for its own networks, which are Primus and hybrid networks (with a transformer on one stage);
``encoder.json`` names the class. ``python load_encoder.py`` prints the shapes of the encoder's features for a patch of zeros.
"""

import json
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from safetensors.torch import load_file

PARTS = ("encoder.", "eva.", "down_projection.", "transformer.")


def load_encoder(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network with the weights of the encoder and a random decoder, and the description of the encoder."""
    spec = json.loads((folder / "encoder.json").read_text())
    architecture = spec["architecture"]
    kwargs = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        kwargs[key] = locate(kwargs[key]) if kwargs[key] is not None else None
    network_class: Any = locate(architecture["network_class_name"])
    network = network_class(input_channels=spec["num_inputs"], num_classes=spec["num_classes"], **kwargs)
    weights = load_file(folder / "encoder.safetensors")
    result = network.load_state_dict(weights, strict=False)
    state = network.state_dict()
    loaded = {state[name].data_ptr() for name in weights}
    left_out = [name for name in result.missing_keys if name.startswith(PARTS) and state[name].data_ptr() not in loaded]
    if result.unexpected_keys or left_out:
        raise RuntimeError(f"the weights do not fit the encoder: {result.unexpected_keys + left_out}")
    return network, spec


if __name__ == "__main__":
    network, spec = load_encoder(Path(__file__).parent)
    patch = torch.zeros(1, spec["num_inputs"], *spec["patch_size"])
    with torch.no_grad():
        if hasattr(network, "encoder"):
            # In a hybrid network, network.transformer continues from the features of its stage.
            for features in network.eval().encoder(patch):
                print(tuple(features.shape))
        else:
            print(tuple(network.eval().encode(patch).shape))
