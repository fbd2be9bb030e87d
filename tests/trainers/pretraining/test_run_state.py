"""The state of a run in a checkpoint is restored unchanged, and exported weights have the values that the method fixes."""

import pytest
import torch
from torch import nn

from nnssl.checkpoint import load_tensors, write_checkpoint
from nnssl.errors import UserError
from nnssl.methods.protocol import Exported
from nnssl.networks.backbone import build_network
from nnssl.networks.primus_positions import POSITIONS, architecture_of_patch, fit_positions
from planners.presets import PRIMUS_SIZES
from planners.primus_rules import primus_architecture
from tests.nnssl.test_checkpoint import make_provenance
from trainers.pretraining.epoch import Epoch
from trainers.pretraining.run_state import network_weights, read_state, run_state


class Method(nn.Module):
    """A method that contains the network, a head and a queue."""

    def __init__(self, network: nn.Module, width: int = 2) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(3, width)
        self.register_buffer("queue", torch.rand(4, 3))


def make(seed: int) -> tuple[nn.Module, Method]:
    torch.manual_seed(seed)
    network = nn.ModuleDict({"encoder": nn.Conv2d(1, 3, 3), "gate": nn.Linear(1, 1)})
    return network, Method(network)


def test_network_method_and_epoch_come_back(tmp_path):
    network, method = make(0)
    records = [{"loss": torch.tensor(1.5), "grad_norm": 2}, {"loss": torch.tensor(0.25), "grad_norm": 3}]
    embeddings = [torch.rand(2, 3), torch.rand(1, 3)]
    state = run_state(
        network, method, Epoch(records, embeddings), {"probe": {"dataset_name": "Labelled"}, "retrieval": None}
    )
    assert set(state["method"]) == {"head.weight", "head.bias", "queue"}  # The network is stored elsewhere.
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(path, {"network_weights": network_weights(network, None)}, make_provenance(), state)
    other_network, other = make(1)
    assert not torch.equal(other.queue, method.queue)
    epoch, measured = read_state(path, load_tensors(path), other_network, other, torch.device("cpu"))
    for (name, value), again in zip(method.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    assert epoch.records == [{"loss": 1.5, "grad_norm": 2.0}, {"loss": 0.25, "grad_norm": 3.0}]
    assert all(torch.equal(a, b) for a, b in zip(epoch.embeddings, embeddings, strict=True))
    assert measured == {"probe": {"dataset_name": "Labelled"}, "retrieval": None, "chosen": None}


def test_heads_of_another_size_or_number_are_refused(tmp_path):
    network, method = make(0)
    path = tmp_path / "checkpoint_latest.pth"
    content = {"network_weights": network_weights(network, None)}
    write_checkpoint(
        path, content, make_provenance(), run_state(network, method, Epoch(), {"probe": None, "retrieval": None})
    )
    more = Method(network)
    more.predictor = nn.Linear(2, 2)
    for wrong in (Method(network, width=5), more):
        with pytest.raises(UserError, match=r"latest.pth: the heads differ .*; delete the results of this stage"):
            read_state(path, load_tensors(path), network, wrong, torch.device("cpu"))


def test_what_leaves_has_the_values_that_the_method_fixes():
    network, _ = make(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = network_weights(network, Exported(("encoder.",), {"gate.weight": 0.5}))
    assert torch.equal(weights["gate.weight"], torch.full((1, 1), 0.5))
    for name, value in before.items():
        assert name == "gate.weight" or torch.equal(weights[name], value)
        assert torch.equal(network.state_dict()[name], value)  # The run continues with its own values.


def test_positions_leave_for_the_patch_of_the_plan_and_come_back():
    """Resampling to twice the tokens keeps the mean of the positions."""
    small, large = (8, 16, 16), (16, 32, 16)
    architecture = primus_architecture(PRIMUS_SIZES[0], (4, 8, 8), large)
    network = build_network(architecture_of_patch(architecture, small), 1, 2, 0)
    inner = network.state_dict()[POSITIONS].shape[1]
    assert inner == 2 * 2 * 2
    left = network_weights(network, Exported(("eva.",)), (small, large))
    assert left[POSITIONS].shape[1] == 4 * 4 * 2
    stock = build_network(architecture, 1, 2, 1)
    stock.load_state_dict(left)  # every weight has the shape of the plan's network
    assert network_weights(network, None, (small, large))[POSITIONS].shape[1] == inner  # for a run that is resumed
    back = dict(left)
    fit_positions(back, large, small, network)
    assert back[POSITIONS].shape[1] == inner
    middle = left[POSITIONS].unflatten(1, (4, 4, 2)).mean(dim=(1, 2, 3))
    assert torch.allclose(middle, network.state_dict()[POSITIONS].mean(dim=1), atol=1e-5)
