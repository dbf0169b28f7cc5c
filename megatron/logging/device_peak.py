"""Dense bf16 peaks by device name, in TFLOP/s, from the vendors' data sheets (figures with sparsity are halved)."""

import re

# A row matches a device whose name has all of its words. The first match wins, so special models come first.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB300",), 2500.0),
    (("GB200",), 2500.0),
    (("B300",), 2250.0),
    (("B200",), 2250.0),
    (("B100",), 1750.0),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H100", "PCIE"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H100",), 989.0),
    (("H800", "PCIE"), 756.0),
    (("H800",), 989.0),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("RTX", "PRO", "6000", "BLACKWELL"), 503.0),
    (("RTX", "6000", "ADA"), 364.0),
    (("RTX", "A6000"), 154.8),
    (("RTX", "5090"), 209.5),
    (("RTX", "4090"), 165.2),
    (("RTX", "3090"), 71.0),
    (("MI355X",), 2516.0),
    (("MI350X",), 2300.0),
    (("MI325X",), 1307.0),
    (("MI300X",), 1307.0),
    (("MI250X",), 383.0),
)


def peak_tflops(device_name: str | None) -> float | None:
    """Return the dense bf16 peak of a device such as "NVIDIA H100 80GB HBM3", or None if it is not known."""
    if device_name is None:
        return None
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((peak for needed, peak in _PEAKS if words.issuperset(needed)), None)
