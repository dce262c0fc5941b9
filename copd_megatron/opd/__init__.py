"""On-policy distillation between branches: who teaches whom, and how the scores travel."""
