"""The checkpoint format: fp32 tensors in pieces, free of layout. Knows neither DeepSpeed nor the model."""
