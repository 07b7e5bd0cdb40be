"""What a WFM learns after pretraining."""
