"""The modality of a channel, from its name."""

import pytest

from planners.modality_rules import name_modality


@pytest.mark.parametrize(
    ("name", "slices", "volumes"),
    [
        ("CT", "CT", "CT"),
        ("ct", "CT", "CT"),
        ("xray", "X-ray", "X-ray"),
        ("X-ray", "X-ray", "X-ray"),
        ("Chest X Ray", "X-ray", "X-ray"),
        ("x_ray", "X-ray", "X-ray"),
        ("radiograph", "X-ray", "X-ray"),
        ("Radiography", "X-ray", "X-ray"),
        ("mammography", "X-ray", "X-ray"),
        ("CR", "X-ray", "CR"),
        ("DX", "X-ray", "DX"),
        ("xr", "X-ray", "xr"),
        ("CXR", "X-ray", "CXR"),
        ("MRI", "MRI", "MRI"),
        ("CRT", "CRT", "CRT"),
        ("CT_portal", "CT_portal", "CT_portal"),
        ("T1 DX", "T1 DX", "T1 DX"),
    ],
)
def test_names_of_channels(name, slices, volumes):
    assert name_modality(name, True) == slices
    assert name_modality(name, False) == volumes
    assert name_modality(slices, True) == slices
