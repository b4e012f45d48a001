"""Searches: runs that an Optuna study proposes and prunes."""
