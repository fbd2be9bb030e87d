import pytest
import torch

from nnssl.devices import find_device
from nnssl.errors import ArgumentError


def test_a_device_is_found_and_the_choice_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == torch.device("cpu")
    assert capsys.readouterr().out == "Device: cpu (no CUDA GPU found)\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device() == torch.device("cuda")
    assert find_device("cuda") == find_device(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "device must be available to PyTorch on this machine, got cuda; use cpu"),
     ("gpu", "device must be cpu, cuda or mps, got gpu")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError) as error:
        find_device(device)
    assert str(error.value) == message
    assert error.value.with_flags({"device": "--device"}) == f"--{message}"
