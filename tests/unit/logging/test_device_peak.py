import pytest

from megatron.logging.device_peak import peak_tflops


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
    ],
)
def test_known_devices_are_told_apart(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("name", [None, "", "cpu", "NVIDIA GeForce GTX 1080", "NVIDIA A1000"])
def test_unknown_devices_have_no_peak(name):
    assert peak_tflops(name) is None
