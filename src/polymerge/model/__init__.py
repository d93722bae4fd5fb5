"""The bundle as a torch model in which every row of a batch has its own expert.

assignment.py  which expert speaks for which row
residual.py    the sum y = rho (W̄ x) + B (A x)
linear.py      a linear layer under an assignment
numbered.py    the same where a tensor on the device says which expert a row has
step.py        a decoding step of fixed shapes, which a GPU can replay
own.py         modules of which experts have their own parameters
moe.py         fused mixture-of-experts blocks
loading.py     from a bundle's files to these modules
mixed.py       the model that a caller sees
triton/        residuals left as they are stored, and a kernel that reads them; imported only when asked for

Layers need torch alone (`benchmarks/gpu.py` runs with them), so nothing is imported here.
"""
