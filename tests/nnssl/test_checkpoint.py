import os
import pickle

import numpy as np
import pytest
import torch

from nnssl.checkpoint import Provenance, in_ranges, load_tensors, read_checkpoint, to_plain, write_checkpoint
from nnssl.errors import UserError


def make_provenance(**changes) -> Provenance:
    values = {
        "nnssl_version": "0",
        "method": "reprec",
        "stage": "reprec.contrastive",
        "dataset_name": "Dataset501_Toy",
        "plans_name": "nnsslPlans",
        "configuration": "3d_fullres_hybrid",
        "plans": {"configurations": {}},
        "dataset_json": {},
        "settings": {"crop_fraction": (0.2, 1.0), "flip_axes": (1, 2)},
        "seed": 0,
        "step": 3,
        "total_steps": 3,
        "finished": True,
        "pretrained": ("encoder.",),
        "init": None,
        "cases": ("a", "b"),
    }
    return Provenance(**{**values, **changes})


def test_pretrained_parts_are_few_words():
    stages = tuple(f"encoder.stages.{number}." for number in range(4))
    made = make_provenance(pretrained=("encoder.stem.", *stages, "transformer.embed.", "decoder.stages.1."))
    assert made.pretrained_parts == (
        "encoder.stem.",
        "encoder.stages.0 to 3",
        "transformer.embed.",
        "decoder.stages.1",
    )
    assert in_ranges([0, 1, 4]) == "0 to 1 and 4"


def test_round_trip_with_weights_only(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    weights = {"encoder.weight": torch.randn(3, 2)}
    content = {"network_weights": weights, "logging": {"loss": [np.float64(1.5), 2.0]}, "current_epoch": np.int64(3)}
    write_checkpoint(path, content, make_provenance(), {"queue": torch.ones(2)})
    loaded = torch.load(path, weights_only=True)
    assert loaded["logging"] == {"loss": [1.5, 2.0]}
    assert type(loaded["logging"]["loss"][0]) is float
    read, provenance = read_checkpoint(path)
    assert torch.equal(read["network_weights"]["encoder.weight"], weights["encoder.weight"])
    assert torch.equal(read["nnssl"]["state"]["queue"], torch.ones(2))
    assert provenance == make_provenance(settings={"crop_fraction": [0.2, 1.0], "flip_axes": [1, 2]})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("version", [1, 3])
def test_other_schemas_are_rejected(tmp_path, version):
    path = tmp_path / "old.pth"
    write_checkpoint(path, {"network_weights": {}}, make_provenance(), {})
    content = torch.load(path, weights_only=True)
    content["nnssl"]["schema_version"] = version
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"old\.pth: schema_version must be 2, got {version}; "):
        read_checkpoint(path)


def test_shared_tensors_stay_shared(tmp_path):
    weight = torch.randn(1000, 50)
    shared, apart = tmp_path / "shared.pth", tmp_path / "apart.pth"
    write_checkpoint(shared, {"network_weights": {"a": weight, "b": weight}}, make_provenance(), {})
    write_checkpoint(apart, {"network_weights": {"a": weight, "b": weight.clone()}}, make_provenance(), {})
    assert apart.stat().st_size - shared.stat().st_size > 0.9 * weight.nbytes


def test_a_matrix_and_its_transpose_are_two_tensors(tmp_path):
    """They share their memory, shape and type, and differ in their strides."""
    path, square = tmp_path / "a.pth", torch.arange(9.0).view(3, 3)
    write_checkpoint(path, {"network_weights": {"a": square, "b": square.T}}, make_provenance(), {})
    weights = load_tensors(path)["network_weights"]
    assert torch.equal(weights["a"], square)
    assert torch.equal(weights["b"], square.T)


def test_plain_values_keep_what_they_are():
    """Keys too; a tuple stays one, as the betas of an optimizer are."""
    plain = to_plain({np.int64(3): (np.float32(0.5), [np.bool_(True)], np.arange(2)), "a": None})
    assert plain == {3: (0.5, [True], [0, 1]), "a": None}
    assert [type(key) for key in plain] == [int, str]
    assert type(plain[3]) is tuple
    assert [type(value) for value in (plain[3][0], plain[3][1][0], plain[3][2][0])] == [float, bool, int]


def test_parts_of_a_network_that_were_pretrained():
    made = make_provenance(pretrained=("encoder.", "transformer.embed.", "transformer.blocks."))
    assert made.pretrains("encoder.")
    assert made.pretrains("encoder.stages.2.")  # a part of what was
    assert made.pretrains("transformer.")  # some of it was
    assert not made.pretrains("decoder.")
    assert not made.pretrains("transformer.project.")


def test_objects_are_refused_when_writing():
    with pytest.raises(TypeError, match="plain Python values, got object"):
        to_plain({"a": [object()]})


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["NNSSL_TEST_TRAP"],))


def test_malicious_pickle_does_not_run(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setenv("NNSSL_TEST_TRAP", str(trap))
    path = tmp_path / "evil.pth"
    torch.save({"network_weights": Malicious()}, path)
    with pytest.raises(UserError, match=r"evil\.pth: holds posix\.mkdir, which could run code"):
        read_checkpoint(path)
    assert not trap.exists()
    # the trap works: a loader that trusts the file falls into it
    torch.load(path, weights_only=False)
    assert trap.exists()


def test_plain_pickle_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"network_weights": {}, "code": print}))
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_tensors(path)


def test_truncated_missing_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, {"network_weights": {"a": torch.randn(100)}}, make_provenance(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"network_weights": {}}, path)
    with pytest.raises(UserError, match="is not a checkpoint of nnssl"):
        read_checkpoint(path)
    torch.save({"nnssl": {"schema_version": 2, "provenance": {}}}, path)
    with pytest.raises(UserError, match="is not a checkpoint of nnssl"):
        read_checkpoint(path)
    torch.save({"network_weights": {}, "nnssl": {"schema_version": 99}}, path)
    with pytest.raises(UserError, match="must be 2, got 99"):
        read_checkpoint(path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, {"network_weights": {"a": torch.zeros(1)}}, make_provenance(), {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_checkpoint(path, {"network_weights": {"a": object()}}, make_provenance(), {})
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint(path / "below_a_file.pth", {"network_weights": {}}, make_provenance(), {})
