"""FOSTER: first-order dataset distillation for text-based sequential recommendation.

Data flows one way through the modules:
`datasets` -> `splits` -> `encoder` -> `sasrec` -> `training` -> `synthetic`, `foster`,
`coresets`, `references` -> `methods` -> `runs` -> `tables`.
"""

__version__ = "0.1.0"
