"""What a model predicts under each kind of statistics, and what the difference is worth."""
