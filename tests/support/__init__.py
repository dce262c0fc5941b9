"""What several tests share: models, data, launchers of ranks and runs."""
