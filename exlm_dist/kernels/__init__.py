"""The operations of ExLM, each in a package with its public functions, the maths (`README.md`) and three forms.

`naive.py` is the definition, written as the equations are; `torch.py` is tuned plain torch, what a CPU runs; `triton`
has the kernels, what a GPU runs. The last two are tested against the first.

Letters: T expanded tokens in a micro-batch, B sequences, D width, H heads, P head width, S states, N targets,
L states of one sequence, V vocabulary, k states per expanded position.
"""

from exlm_dist.kernels.attention import attention, rotary_angles
from exlm_dist.kernels.backend import BACKENDS, has_triton, resolve_backend
from exlm_dist.kernels.dag import dag_best_path, dag_log_likelihood, dag_posteriors
from exlm_dist.kernels.transitions import transition_log_probs
from exlm_dist.kernels.vocab import match_scores

__all__ = [
    "BACKENDS",
    "attention",
    "dag_best_path",
    "dag_log_likelihood",
    "dag_posteriors",
    "has_triton",
    "match_scores",
    "resolve_backend",
    "rotary_angles",
    "transition_log_probs",
]
