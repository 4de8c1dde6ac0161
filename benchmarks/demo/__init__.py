"""The demonstration over seeds, hyperparameters and regimes."""
