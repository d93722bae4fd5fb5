"""What leaves a bundle.

dense.py      one expert as an ordinary checkpoint
peft.py       one expert as an adapter for plain PEFT
expressed.py  what adapters of a runtime can express of a bundle
factors.py    the factors of these adapters
average.py    the weights that they are added to
vllm/         all experts as adapters that vLLM serves, over the average; norms, calibration and prompts for both
gguf/         the same for llama.cpp and Ollama
quantise.py   a bundle whose base is stored in fewer bits
place.py      where an export is written
"""

from .dense import export_dense
from .gguf.export import GgufExport, export_gguf
from .gguf.plan import GgufPlan, plan_gguf
from .peft import PeftExport, export_peft
from .quantise import QuantisedBundle, quantize_bundle
from .vllm.export import VllmExport, write_vllm
from .vllm.plan import VllmPlan, plan_vllm
from .vllm.start import export_vllm

__all__ = [
    "GgufExport",
    "GgufPlan",
    "PeftExport",
    "QuantisedBundle",
    "VllmExport",
    "VllmPlan",
    "export_dense",
    "export_gguf",
    "export_peft",
    "export_vllm",
    "plan_gguf",
    "plan_vllm",
    "quantize_bundle",
    "write_vllm",
]
