"""From branches to one model."""
