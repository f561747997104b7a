"""A checkpoint fine-tuned to predict columns of a table: targets, splits, training, predictions, estimators."""
