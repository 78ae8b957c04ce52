"""Which device was measured where, and whose numbers a device takes that was not."""

from typing import NamedTuple

AICONFIGURATOR = "github:ai-dynamo/aiconfigurator@095f58a51"
SIMUMAX = "github:MooreThreads/SimuMax@4dcaae5"
OPERATORS = "github:DebarghaG/estimate-train-time@1ac4d5e"
FIGURES = "github:Dao-AILab/flash-attention assets (figures)"
PAPER = "arXiv 2407.08608 (figure of the backward)"

# As the driver counts them, not the full die.
NUM_PROCESSORS = {
    "v100-sxm2-16gb": 80,
    "v100-sxm2-32gb": 80,
    "a100-sxm-40gb": 108,
    "a100-sxm-80gb": 108,
    "a100-pcie-80gb": 108,
    "h100-pcie": 114,
    "h100-sxm": 132,
    "h200-sxm": 132,
    "b200-sxm": 148,
    "b300-sxm": 148,
    "gb200": 152,
    "gb300": 152,
    "l40s": 142,
    "mi300x": 304,
}


class Source(NamedTuple):
    """Where products were measured: the device's name in kernels.csv, dtypes, the source."""

    name: str
    dtypes: tuple[str, ...]
    source: str
    date: str


MATMULS = {
    "a100-sxm-80gb": Source("NVIDIA A100-SXM4-80GB", ("bf16",), AICONFIGURATOR, "2026-01-01"),
    "a100-pcie-80gb": Source("A100-PCIe-80GB", ("bf16",), SIMUMAX, "2026-05-01"),
    "h100-sxm": Source("NVIDIA H100 80GB HBM3", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
    "h200-sxm": Source("NVIDIA H200", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
    "b200-sxm": Source("NVIDIA B200", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
    "gb200": Source("NVIDIA GB200", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
    "b300-sxm": Source("NVIDIA B300 SXM6 AC", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
    "l40s": Source("NVIDIA L40S", ("bf16", "fp8"), AICONFIGURATOR, "2026-01-01"),
}
BLACKWELL = ("b200-sxm", "gb200", "b300-sxm")

# The same silicon beside another memory: the numbers hold as measured.
MATMUL_TWINS = {"a100-sxm-40gb": "a100-sxm-80gb"}
ATTENTION_TWINS = {"a100-sxm-40gb": "a100-sxm-80gb", "h200-sxm": "h100-sxm"}
MEMORY_TWINS = {"a100-sxm-40gb": "a100-sxm-80gb", "h200-sxm": "h100-sxm"}
# The nearest relative of a device that was not measured.
MATMUL_RELATIVES = {
    "v100-sxm2-16gb": "a100-sxm-80gb",
    "v100-sxm2-32gb": "a100-sxm-80gb",
    "h100-pcie": "h100-sxm",
    "gb300": "b300-sxm",
    "mi300x": "h100-sxm",
}
ATTENTION_RELATIVES = {
    "a100-pcie-80gb": "a100-sxm-80gb",
    "h100-pcie": "h100-sxm",
    "gb300": "b300-sxm",
    "l40s": "a100-sxm-80gb",
    "mi300x": "a100-sxm-80gb",
}
MEMORY_RELATIVES = {
    "v100-sxm2-16gb": "a100-sxm-80gb",
    "v100-sxm2-32gb": "a100-sxm-80gb",
    "a100-pcie-80gb": "a100-sxm-80gb",
    "l40s": "a100-sxm-80gb",
    "mi300x": "a100-sxm-80gb",
    "h100-pcie": "h100-sxm",
    "b200-sxm": "h100-sxm",
    "gb200": "h100-sxm",
    "b300-sxm": "h100-sxm",
    "gb300": "h100-sxm",
}
# Operators of GH200 stand for H100; its HBM3 streams 4 TB/s (NVIDIA's GH200 data sheet, 96 GB).
OPERATOR_GPUS = {
    "a100-sxm-80gb": ("NVIDIAA100-SXM4-80GB", 2039e9),
    "h100-sxm": ("NVIDIAGH200120GB", 4000e9),
}
# Four times the largest of these caches (H100: 50 MB) no longer fits.
SMALLEST_ADD_BYTES = 200_000_000
MAMF = {"mi300x": "AMD MI300X", "h100-sxm": "NVIDIA H100 SXM"}
# V100 has no bf16; its products in fp16 take the place.
WIDE = "bf16"
