"""What leaves a bundle.

dense.py      one expert as an ordinary checkpoint
peft.py       one expert as an adapter for plain PEFT
vllm_plan.py  what vLLM can express of a bundle
vllm.py       all experts as adapters that vLLM serves, over the average
norms.py      which linear layers can take an expert's norm in
calibrate.py  what the layers see, and what an export changed in the model's own predictions
samples.py    prompts to measure on
place.py      where an export is written
"""

from .dense import export_dense
from .peft import PeftExport, export_peft
from .vllm.export import VllmExport, write_vllm
from .vllm.plan import VllmPlan, plan_vllm
from .vllm.start import export_vllm

__all__ = [
    "PeftExport",
    "VllmExport",
    "VllmPlan",
    "export_dense",
    "export_peft",
    "export_vllm",
    "plan_vllm",
    "write_vllm",
]
