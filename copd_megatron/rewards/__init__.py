"""Verifiable rewards: small deterministic programs that grade a response, and what runs them safely.

``registry.py`` finds verifiers by name; ``verifiers/`` holds the built-in ones, a small file each;
``final_answer.py`` says which part of a response counts as its answer; ``grader.py`` grades rollouts with a
time limit, in worker processes (``isolation.py``, ``worker.py``) where a verifier might hang. No torch.

To add a verifier named ``foo``: write ``verifiers/foo.py`` with a function decorated ``@register("foo")``,
and list ``foo`` in the branch's ``reward.verifiers``. A function in your own package needs no file here:
list it as ``package.module:function`` and name it so in the samples.
"""

from copd_megatron.rewards.grader import Grader
from copd_megatron.rewards.registry import UnknownVerifierError, Verifier, get, known, register, resolve

__all__ = ["Grader", "UnknownVerifierError", "Verifier", "get", "known", "register", "resolve"]
